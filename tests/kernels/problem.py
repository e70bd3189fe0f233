"""Weights, types and launches that the kernel tests share."""

import math
from typing import Any

import torch
from torch import Tensor

from ferrolora import QuantSpec, QuantTensor, quantize

TYPES = {"float": torch.float32, "half": torch.float16, "bf16": torch.bfloat16}
SIXTEEN_BIT = ["half", "bf16"]
# The largest relative error of rounding to the type: 24, 11 and 8 bits of significand.
ROUNDING = {"float": 2.0**-24, "half": 2.0**-11, "bf16": 2.0**-8}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def nan(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output that shows what was not written."""
    return torch.full(shape, math.nan, dtype=dtype)


def weight(
    shape: tuple[int, ...], quant_type: str = "nf4", block_size: int = 64, nested: bool = False, seed: int = 0
) -> QuantTensor:
    """A quantized normal tensor whose blocks differ in scale."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    values *= torch.logspace(-1, 1, values.numel()).reshape(shape)
    return quantize(values, QuantSpec(quant_type, block_size, double_quant=nested))


def parts(qt: QuantTensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes, absmax, nested absmax and offset: the arguments that describe a weight."""
    return qt.codes, qt.absmax, qt.nested_absmax, qt.offset


def codec_constants(qt: QuantTensor) -> dict[str, Any]:
    """The macros that describe a weight's codec."""
    quant_type, block_size = qt.codec
    return {"FL_CODEC": quant_type, "FL_BLOCK_SIZE": block_size, "FL_NESTED": int(qt.nested_absmax is not None)}
