"""The weights and activations that every contender of a problem gets."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ferrolora.bench.problem import DTYPES, RANK, Problem
from ferrolora.ops import reference
from ferrolora.ops.quantize import quantize
from ferrolora.spec import QuantSpec
from ferrolora.tensor import QuantTensor

SPEC = QuantSpec("nf4", block_size=64, double_quant=True)
WEIGHT_SPREAD = 0.02  # standard deviation, about that of a trained weight of these sizes


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    """Normal values, the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * spread).to(dtype)


def float_weight(problem: Problem) -> Tensor:
    """The weight before it is quantized, `[N, K]` in the problem's type."""
    return normal((problem.n, problem.k), 0, problem.torch_dtype, WEIGHT_SPREAD)


class Weight(NamedTuple):
    """A weight in the forms that contenders take.

    Args:
        packed: NF4, blocks of 64, double quantization.
        decoded: float32 `[N, K]`, the values the bytes stand for, by the reference twin.
        dense: the same in the problem's type: what a library without quantization multiplies with.
    """

    packed: QuantTensor
    decoded: Tensor
    dense: Tensor


def weight(problem: Problem) -> Weight:
    """The weight of a problem; the last one is kept, since rows that differ in M share it."""
    return _weight(problem.n, problem.k, problem.dtype)


@lru_cache(maxsize=1)
def _weight(n: int, k: int, dtype: str) -> Weight:
    packed = quantize(float_weight(Problem(n, k, dtype)), SPEC)
    decoded = decode(packed, torch.float32)
    return Weight(packed, decoded, decoded.to(DTYPES[dtype]))


def forget_weight() -> None:
    """Let go of the weight that is kept."""
    _weight.cache_clear()


def decode(packed: QuantTensor, dtype: torch.dtype) -> Tensor:
    """The values of an NF4 weight by the reference twin, not by the kernels that are on trial."""
    offset = 0.0 if packed.offset is None else float(packed.offset)
    scales = (packed.absmax, packed.nested_absmax, offset)
    return reference.dequantize_4bit(packed.codes, *scales, *packed.codec, tuple(packed.shape), dtype)


def activations(problem: Problem) -> Tensor:
    """x `[M, K]`."""
    return normal((problem.rows, problem.k), 1, problem.torch_dtype)


def output_gradient(problem: Problem) -> Tensor:
    """dY `[M, N]`."""
    return normal((problem.rows, problem.n), 2, problem.torch_dtype)


def low_rank(problem: Problem) -> tuple[Tensor, Tensor]:
    """A `[r, K]` and B `[N, r]`, float32 as adapters are; B not zero, so that every gradient is alive."""
    return (
        normal((RANK, problem.k), 3, torch.float32, WEIGHT_SPREAD),
        normal((problem.n, RANK), 4, torch.float32, WEIGHT_SPREAD),
    )


def bitsandbytes_layer(packed: QuantTensor, dtype: torch.dtype) -> Any:
    """bitsandbytes' Linear4bit without bias that holds exactly our bytes, so that one oracle serves both.

    Its own bytes would be equal but for the last bits of the scales of scales.
    """
    bnb: Any = import_module("bitsandbytes")

    n, k = packed.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        normal((n, k), 0, packed.dtype, WEIGHT_SPREAD), requires_grad=False, quant_type="nf4"
    )
    layer = layer.to("cpu")  # quantizes
    state: Any = layer.weight.quant_state
    layer.weight.data.copy_(packed.codes)
    state.absmax.copy_(packed.absmax)
    state.state2.absmax.copy_(packed.nested_absmax)
    state.offset.copy_(packed.offset)
    return layer
