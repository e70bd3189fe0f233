"""The GPUs of this machine, as the driver describes them; no context is made."""

from __future__ import annotations

from typing import Any

import torch

from ferrolora import _native
from ferrolora.errors import CudaError


def describe() -> dict[str, Any]:
    """The driver, its devices, and what stands between them and a kernel.

    Returns: `{"driver", "devices": [{"name", "sm", "multiprocessors", "shared_per_block", "kernels"}], "torch_cuda",
    "missing"}`: driver is the newest CUDA that it speaks, such as "13.2", or None; sm is 10 · major + minor of the
    compute capability; kernels says whether we compile for it; missing is one sentence for each obstacle.
    """
    built_for = torch.version.cuda
    try:
        found = _native.cuda_driver()
    except CudaError as error:
        return {"driver": None, "devices": [], "torch_cuda": built_for, "missing": [str(error)]}
    version, devices = found["version"], found["devices"]
    missing = [
        f"no kernels for {row['name']}: its compute capability {dotted(row['sm'])} is not one of "
        f"{', '.join(map(dotted, _native.cuda_architectures()))}"
        for row in devices
        if not row["kernels"]
    ]
    if not devices:
        missing.append("the driver sees no GPU; does CUDA_VISIBLE_DEVICES hide it?")
    if built_for is None:
        missing.append(f"torch {torch.__version__} was built without CUDA; install one that was: https://pytorch.org")
    elif devices and not torch.cuda.is_available():
        missing.append(
            f"torch was built for CUDA {built_for}, and the driver speaks {version}: update the driver, or install a "
            "torch for an older CUDA"
        )
    return {"driver": version, "devices": devices, "torch_cuda": built_for, "missing": missing}


def dotted(sm: int) -> str:
    """A compute capability as people write it: 9.0 for 90."""
    return f"{sm // 10}.{sm % 10}"
