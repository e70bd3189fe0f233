"""From a problem to a kernel on the device, once, and from there to a launch on torch's current stream."""

from __future__ import annotations

import functools
from typing import Any, TypedDict

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.cuda import jit
from ferrolora.cuda.crossover import tuned_rows
from ferrolora.cuda.workspace import counters, scratch
from ferrolora.errors import CudaError

Given = dict[str, Tensor | float | None]


class Problem(TypedDict):
    """A problem as the native planner takes it; `problem` fills in what an operator does not have."""

    op: str
    dtype: str
    quant_type: str
    block_size: int
    nested: bool
    m: int
    n: int
    k: int
    rank: int
    lora_dtype: str | None
    bias_dtype: str | None
    dropout_p: float
    exact: bool
    kernel: str | None
    fused_rows: int | None


def problem(op: str, **fields: Any) -> Problem:
    """A problem with defaults: one value, float32, nf4 in blocks of 64, no branch, no bias, the planner's choice.

    Args:
        op: what is to be computed, as rust/cuda's table of operators names it.
        fields: those of Problem that differ from the defaults.

    Raises:
        TypeError: a field that no problem has.
    """
    defaults: Problem = {
        "op": op,
        "dtype": "float32",
        "quant_type": "nf4",
        "block_size": 64,
        "nested": False,
        "m": 0,
        "n": 1,
        "k": 1,
        "rank": 0,
        "lora_dtype": None,
        "bias_dtype": None,
        "dropout_p": 0.0,
        "exact": False,
        "kernel": None,
        "fused_rows": None,
    }
    unknown = set(fields) - set(defaults)
    if unknown:
        raise TypeError(f"a problem has no {', '.join(sorted(unknown))}")
    return {**defaults, **fields}  # type: ignore[typeddict-item]  # mypy does not see that the keys are known


@functools.lru_cache(maxsize=8192)
def prepare(
    index: int,
    op: str,
    dtype: torch.dtype,
    n: int,
    k: int,
    m: int = 0,
    quant_type: str = "nf4",
    block_size: int = 64,
    nested: bool = False,
    rank: int = 0,
    lora_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    kernel: str | None = None,
) -> _native.CudaLaunch | None:
    """The launch of a problem on the device `index`, its kernel compiled and loaded; None: torch's own product.

    Raises:
        CudaError: no driver, no compiler, or a graph is being captured and the kernel is not loaded yet.
        UnsupportedError: no kernel takes the problem; says why for each.
    """
    asked = problem(
        op,
        dtype=_name(dtype),
        quant_type=quant_type,
        block_size=block_size,
        nested=nested,
        m=m,
        n=n,
        k=k,
        rank=rank,
        lora_dtype=None if lora_dtype is None else _name(lora_dtype),
        bias_dtype=None if bias_dtype is None else _name(bias_dtype),
        dropout_p=dropout_p,
        kernel=kernel,
        fused_rows=tuned_rows(index),
    )
    launch = _native.cuda_launch(asked, index)
    if launch is not None and not launch.is_loaded:
        if torch.cuda.is_current_stream_capturing():
            raise CudaError(
                f"cuda:{index} is capturing a CUDA graph, and loading the kernel {launch.entry} would end the capture: "
                "call the operator once with these shapes and types before the capture"
            )
        launch.load(jit.cubin(launch.file, launch.constants, launch.sm))
    return launch


def run(launch: _native.CudaLaunch, index: int, given: Given) -> None:
    """Launch on the current stream of the device `index`.

    Args:
        launch: from `prepare`, for the same device.
        index: of the device.
        given: tensors, contiguous and aligned as `ready` makes them, and numbers, by the names of the kernel's
            parameters; those that the plan does not read may be None or absent.
    """
    stream = torch._C._cuda_getCurrentRawStream(index)  # the public way makes a Stream object at each call
    room = scratch(launch.scratch_bytes, index, stream) if launch.scratch_bytes else None
    words = counters(launch.counters, index, stream) if launch.counters else None
    launch(stream, room, words, given)


def ready(tensor: Tensor) -> Tensor:
    """The tensor as kernels read it: contiguous, and at a multiple of 16 bytes, which a slice of another may not be."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
