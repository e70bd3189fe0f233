"""Quantized weights for tests of products, and what a product may be off by."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ferrolora import QuantSpec, QuantTensor, quantize


def weight(n: int, k: int, quant_type: str = "nf4", block_size: int = 64, nested: bool = True) -> QuantTensor:
    """A normal matrix, quantized, on the CPU."""
    return quantize(torch.randn(n, k), QuantSpec(quant_type, block_size, nested))


def parts(qt: QuantTensor) -> tuple[Any, ...]:
    """A weight as the operators take it, without n and k."""
    return qt.codes, qt.absmax, qt.nested_absmax, qt.offset, *qt.codec


def assert_close(
    got: Tensor, formula: Callable[..., Tensor], *operands: Tensor, depth: int, rounded: torch.dtype
) -> None:
    """`got` is formula(*operands), a sum of products, within the roundings of the kernels.

    With every operand's magnitude the formula gives the sum of the magnitudes of its terms. Each term is rounded at
    most four times to the type of the activations (the weight, S or dS, the part without the branch, the result); a
    float32 sum of depth terms errs by at most depth · 2⁻²⁴ of that sum (Higham 2002, section 3.1), and eight more
    roundings are for scales, splits and the scaling.
    """
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[rounded]
    right, terms = formula(*(t.double() for t in operands)), formula(*(t.double().abs() for t in operands))
    assert not ((got.double() - right).abs() > (4 * unit + (depth + 8) * 2.0**-24) * terms).any()
