"""What one row measures: an operation's sizes and float type."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANK = 16  # of the low-rank branch
SCALING = 2.0  # its factor: alpha 32 over rank 16


@dataclass(frozen=True)
class Problem:
    """Sizes of a product `x [M, K] · W [N, K]ᵀ`, or of the weight alone.

    Args:
        n: rows of the weight.
        k: columns of the weight.
        dtype: a key of `DTYPES`: the type of the activations, and of the weight before it is quantized.
        m: rows of the activations; None for an operation on the weight alone. Default None.
    """

    n: int
    k: int
    dtype: str
    m: int | None = None

    @property
    def work(self) -> str:
        """The sizes as they are written on the command line: MxNxK, or NxK."""
        return "x".join(str(size) for size in (self.m, self.n, self.k) if size is not None)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The float type."""
        return DTYPES[self.dtype]

    @property
    def rows(self) -> int:
        """M of a product.

        Raises:
            ValueError: the problem is one of the weight alone.
        """
        if self.m is None:
            raise ValueError(f"the problem {self.work} has no activations")
        return self.m

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the float weight."""
        return self.n * self.k * self.torch_dtype.itemsize

    @cached_property
    def packed_bytes(self) -> int:
        """Bytes of the weight in NF4, blocks of 64, double quantization."""
        blocks = -(-self.n * self.k // 64)
        return -(-self.n * self.k // 2) + blocks + 4 * -(-blocks // 256) + 4

    @property
    def activation_bytes(self) -> int:
        """Bytes of x and y together."""
        return self.rows * (self.n + self.k) * self.torch_dtype.itemsize

    @property
    def flops(self) -> int:
        """Multiplications and additions of one product: 2·M·N·K."""
        return 2 * self.rows * self.n * self.k
