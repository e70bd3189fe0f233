"""What the products must give, with the bound of each element: float64 over the decoded weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ferrolora.bench.approximation import Approximation
from ferrolora.bench.problem import SCALING


def decoded_weight(decoded: Tensor, dtype: torch.dtype) -> Approximation:
    """The weight as a kernel may see it when it computes in `dtype`.

    The definition rounds table·scale to float32 once. A kernel that multiplies sums by the scale rounds elsewhere
    instead, so two roundings are allowed; with 16-bit activations one more, of the weight to that type.
    """
    exact = Approximation.exact(decoded)
    rounded = exact.rounded(torch.float32).rounded(torch.float32)
    return rounded if dtype == torch.float32 else rounded.rounded(dtype)


def product(x: Tensor, weight: Approximation) -> Approximation:
    """y = x·Wᵀ, summed in float32 and rounded to the type of x. x `[M, K]`, W `[N, K]`."""
    return (Approximation.exact(x) @ weight.T).rounded(x.dtype)


def bfloat16_product(x: Tensor, decoded: Tensor) -> Approximation:
    """The product by a kernel that computes in bfloat16 whatever the type of x, as one of bitsandbytes' does.

    Rounded to bfloat16: x, the scale, the table, their product, and the result.
    """
    weight = Approximation.exact(decoded).rounded(torch.bfloat16).rounded(torch.bfloat16).rounded(torch.bfloat16)
    narrow = Approximation.exact(x).rounded(torch.bfloat16)
    return (narrow @ weight.T).rounded(torch.bfloat16).rounded(x.dtype)


class Gradients(NamedTuple):
    """y, dX, dA, dB of a layer with a low-rank branch."""

    y: Approximation
    dx: Approximation
    da: Approximation
    db: Approximation


def low_rank_layer(x: Tensor, weight: Approximation, a: Tensor, b: Tensor, dy: Tensor) -> Gradients:
    """Forward and backward of y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ.

    Every intermediate result may be rounded once to the type of x: x·Wᵀ, S = x·Aᵀ, s·S·Bᵀ, and their like in backward.
    The gradients of A and B are rounded to the type of A and B. Beside 16-bit activations the float32 factors A and B
    may be held as pairs of 16-bit values.
    """
    dtype = x.dtype
    wide, up, down, out = (Approximation.exact(tensor) for tensor in (x, a, b, dy))
    if dtype != torch.float32:
        up, down = up.split(), down.split()
    s = (wide @ up.T).rounded(dtype)  # [M, r]
    branch = (s @ down.T).scaled(SCALING).rounded(torch.float32).rounded(dtype)
    y = ((wide @ weight.T).rounded(dtype) + branch).rounded(dtype)
    ds = (out @ down).scaled(SCALING).rounded(torch.float32).rounded(dtype)  # [M, r]
    dx = ((out @ weight).rounded(dtype) + (ds @ up).rounded(dtype)).rounded(dtype)
    da = (ds.T @ wide).rounded(a.dtype)
    db = (out.T @ s).scaled(SCALING).rounded(torch.float32).rounded(b.dtype)
    return Gradients(y, dx, da, db)
