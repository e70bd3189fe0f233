"""Compile a kernel of the table for one architecture, once for each machine: NVRTC through cuda.core, kept on disk.

The compiler needs no GPU and our sources no CUDA header. NVRTC is the one that torch's own wheels bring.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ferrolora import _native
from ferrolora.errors import CudaError

CACHE_BYTES = 256 * 2**20  # the least recently read cubins leave beyond this; one is 5-100 kB


def extra() -> str:
    """The pip extra that brings what compiling needs, for the CUDA that torch was built with (13 if for none)."""
    major = (torch.version.cuda or "13").partition(".")[0]
    return f"ferrolora[cuda{'12' if major == '12' else '13'}]"


def cache_directory() -> Path:
    """Where cubins are kept: `$XDG_CACHE_HOME/ferrolora/cubin`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ferrolora" / "cubin"


def cubin(file: str, constants: Mapping[str, str], sm: int) -> bytes:
    """The machine code of a source of the kernel table.

    Args:
        file: its name, as the kernel table has it.
        constants: the compile-time constants, name to value.
        sm: the architecture, 10 · major + minor of the compute capability.

    Returns:
        A cubin; from disk if the same source was compiled with the same constants, architecture and compiler before.

    Raises:
        CudaError: cuda.core or NVRTC is missing (names which, and the extra that brings it), or the compiler refuses
            the source or the architecture.
    """
    core, utils = _compiler()
    from cuda.core._utils.cuda_utils import CUDAError

    macros = sorted(constants.items())
    options = core.ProgramOptions(name=file, arch=f"sm_{sm}", std="c++17", define_macro=macros)
    try:
        program = core.Program(_native.cuda_source(file), "c++", options)
        with utils.FileStreamProgramCache(cache_directory(), max_size_bytes=CACHE_BYTES) as cache:
            return bytes(program.compile("cubin", cache=cache).code)
    except CUDAError as error:
        what = f"{file} for sm_{sm} with {', '.join(f'{name}={value}' for name, value in macros)}"
        raise CudaError(f"NVRTC {nvrtc_version()} cannot compile {what}: {error}") from error


@functools.cache
def _compiler() -> tuple[Any, Any]:
    """cuda.core and its utilities, with NVRTC loaded."""
    try:
        import cuda.core as core
        from cuda.core import utils
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError as error:
        raise CudaError(
            f"compiling the CUDA kernels needs the package cuda-core ({error}); pip install '{extra()}'"
        ) from error
    try:
        load_nvidia_dynamic_lib("nvrtc")
    except RuntimeError as error:
        raise CudaError(
            f"compiling the CUDA kernels needs NVRTC, which was not found; pip install '{extra()}' ({error})"
        ) from error
    return core, utils


def nvrtc_version() -> str:
    """The compiler's version, such as "13.2".

    Raises:
        CudaError: it is missing.
    """
    _compiler()
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CudaError(f"NVRTC does not tell its version: {status}")
    return f"{major}.{minor}"


def describe() -> dict[str, Any]:
    """What compiling needs and what of it is here.

    Returns: `{"cuda_core", "nvrtc", "cache", "cached", "missing"}`: versions, or None for what is absent; the directory
    of the cache and the number of kernels in it; and one sentence for each absent part, with its mend.
    """
    missing = []
    found: dict[str, str | None] = {"cuda_core": None, "nvrtc": None}
    try:
        found["cuda_core"] = version("cuda-core")
        found["nvrtc"] = nvrtc_version()
    except PackageNotFoundError:
        missing.append(f"cuda-core is not installed: pip install '{extra()}'")
    except CudaError as error:
        missing.append(str(error))
    entries = cache_directory() / "entries"
    cached = sum(1 for path in entries.rglob("*") if path.is_file()) if entries.is_dir() else 0
    return {**found, "cache": str(cache_directory()), "cached": cached, "missing": missing}
