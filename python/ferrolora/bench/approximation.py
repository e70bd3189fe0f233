"""Error bounds carried through a computation: what a correct kernel may be off by, element by element.

An `Approximation` holds float64 values and, for each, how far a computation in floating point may lie from it. The
rules are the standard ones (Higham, Accuracy and Stability of Numerical Algorithms, 2002, sections 2.2 and 3.5), u the
unit roundoff of a type:

    rounding       |fl(a) - a| ≤ u·|a| + η               η: half the smallest subnormal of the type
    inner product  |fl(Σ a·b) - Σ a·b| ≤ g·Σ |a|·|b|     g = K·u / (1 - K·u), for any order of K products and sums

No constant here is fitted to a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
UNDERFLOW = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}


@dataclass(frozen=True)
class Approximation:
    """Values float64 and the largest error of each, float64 of a shape that broadcasts to theirs."""

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, tensor: Tensor) -> Approximation:
        """The values of a tensor as they stand."""
        return cls(tensor.detach().double(), torch.zeros((), dtype=torch.float64))

    @property
    def T(self) -> Approximation:
        """The transpose of a matrix."""
        return Approximation(self.value.T, self.error.T if self.error.dim() else self.error)

    @property
    def largest(self) -> Tensor:
        """The largest magnitude that each element may have."""
        return self.value.abs() + self.error

    def rounded(self, dtype: torch.dtype) -> Approximation:
        """After one rounding to `dtype`."""
        return Approximation(self.value, self.error + UNIT_ROUNDOFF[dtype] * self.largest + UNDERFLOW[dtype])

    def split(self) -> Approximation:
        """Each value held as the sum of two bfloat16: what is left after the first is rounded to the second.

        Of a value in [1, 2) at most 2⁻⁸ is left, and rounding that leaves at most 2⁻¹⁷.
        """
        return Approximation(self.value, self.error + 2.0**-17 * self.largest)

    def scaled(self, factor: float) -> Approximation:
        """Times an exact number; the product's own rounding is left to `rounded`."""
        return Approximation(self.value * factor, self.error * abs(factor))

    def __add__(self, other: Approximation) -> Approximation:
        return Approximation(self.value + other.value, self.error + other.error)

    def __matmul__(self, other: Approximation) -> Approximation:
        """The matrix product, summed in float32 in any order."""
        terms = self.value.shape[1]
        u = UNIT_ROUNDOFF[torch.float32]
        gamma = terms * u / (1.0 - terms * u)
        largest = self.largest @ other.largest  # Σ (|a| + error of a)·(|b| + error of b)
        error = gamma * largest
        if self.error.dim() or other.error.dim():
            error += largest - self.value.abs() @ other.value.abs()
        return Approximation(self.value @ other.value, error)
