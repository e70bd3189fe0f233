"""Problems of the quantized linear for the kernel tests, and what the kernels must give, in float64.

The references round where a kernel rounds (16-bit tables, 16-bit operands of the low-rank branch) and nowhere else, so
the tolerance is that of float32 sums and of one rounding of the output.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ferrolora import QuantSpec, QuantTensor, _native, quantize
from kernels.emulator import Out
from kernels.problem import ROUNDING, TYPES, codec_constants, nan, parts, weight

SEED = 0x1234_5678_9ABC_DEF


@dataclass(frozen=True)
class Problem:
    """One linear with its branch; `y = x·Wᵀ + bias + scaling·S·Bᵀ`."""

    m: int
    n: int
    k: int
    type_name: str = "half"
    quant_type: str = "nf4"
    block_size: int = 64
    nested: bool = False
    rank: int = 0
    lora_type: str = "float"
    bias: bool = False
    dropout_p: float = 0.0
    splits: int = 1
    scaling: float = 0.75
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return TYPES[self.type_name]

    def random(self, *shape: int, seed: int, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(dtype or self.dtype)

    def weight(self) -> QuantTensor:
        if self.quant_type == "int8":
            return quantize(self.random(self.n, self.k, seed=1, dtype=torch.float32), QuantSpec("int8"))
        return weight((self.n, self.k), self.quant_type, self.block_size, self.nested)

    def operands(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        lora = TYPES[self.lora_type]
        return self.random(self.rank, self.k, seed=2, dtype=lora), self.random(self.n, self.rank, seed=3, dtype=lora)

    def mask(self) -> Tensor:
        """What dropout multiplies x by: 0 or 1 / (1 - p)."""
        mask = torch.ones(self.m, self.k)
        if self.dropout_p:
            _native.dropout_mask(SEED, self.m, self.k, self.dropout_p, mask)
        return mask

    def dropout_arguments(self) -> tuple[int, float]:
        """threshold and keep: `p` is a float32, as in the core."""
        p = torch.tensor(self.dropout_p, dtype=torch.float32).item()
        return int(p * 2.0**32), 1.0 / (1.0 - p)

    def macros(self, qt: QuantTensor | None = None) -> dict[str, Any]:
        branch = {"FL_RANK": self.rank, "FL_LORA_TYPE": self.lora_type, "FL_DROPOUT": int(self.dropout_p > 0)}
        codec = {} if qt is None else {"FL_BIAS_TYPE": self.type_name, **codec_constants(qt)}
        return {"FL_TYPE": self.type_name, **branch, **codec, **self.constants}

    def workspace(self, elements: int, tiles: int) -> tuple[Out | None, Out]:
        """Partial sums, null with one split, and counters."""
        partial = Out(nan(self.splits * elements, dtype=torch.float32)) if self.splits > 1 else None
        return partial, Out(torch.zeros(tiles, dtype=torch.int32))


SEED_TENSOR = torch.tensor(SEED, dtype=torch.int64)


def table_rounded(qt: QuantTensor, dtype: torch.dtype) -> Tensor:
    """`round(table)[code] · absmax` in float64: a weight whose table is 16-bit and whose scale is not."""
    codebook = torch.tensor(_native.codebook(qt.spec.quant_type)).to(dtype).double()
    one = codebook.tolist().index(1.0)
    scale = replace(qt, codes=torch.full_like(qt.codes, 17 * one)).dequantize(torch.float32)
    nibbles = torch.stack([qt.codes.flatten() >> 4, qt.codes.flatten() & 15], 1).flatten()[: qt.numel()]
    return codebook[nibbles.long()].reshape(qt.shape) * scale.double()


@dataclass(frozen=True)
class Term:
    """`mask ⊙ (left @ right)`, in float64."""

    left: Tensor
    right: Tensor
    mask: Tensor | None = None

    def value(self) -> Tensor:
        return self._product(self.left.double(), self.right.double())

    def size(self) -> Tensor:
        """The same of the magnitudes: what the error of the sum is measured by."""
        return self._product(self.left.double().abs(), self.right.double().abs())

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right if self.mask is None else self.mask.double() * (left @ right)


def assert_close(got: Tensor, terms: list[Term], type_name: str, addend: Tensor | None = None) -> None:
    """`got` is the sum of the terms and of `addend`, up to float32 sums and one rounding to its type.

    A float32 sum of n products errs by at most n · 2⁻²⁴ of the sum of their magnitudes (Higham, Accuracy and Stability
    of Numerical Algorithms, 2002, section 3.1); eight more roundings are for scales, splits and the epilogue.
    """
    extra = torch.zeros(1).double() if addend is None else addend.double()
    expected = sum((term.value() for term in terms), extra)
    size = sum((term.size() for term in terms), extra.abs())
    depth = sum(term.left.shape[1] for term in terms) + 8
    # 2⁻²⁵: half of the smallest subnormal float16, the error of one that underflows.
    bound = ROUNDING[type_name] * expected.abs() + depth * 2.0**-24 * size + 2.0**-25
    wrong = ~((got.double() - expected).abs() <= bound)  # NaN is wrong too
    assert not wrong.any(), f"{int(wrong.sum())} of {got.numel()} differ, first at {wrong.nonzero()[0].tolist()}"


def run_forward(
    kernel: Any, problem: Problem, grid: tuple[int, int, int], threads: int, x: Tensor | None = None, **launch: Any
) -> dict[str, Any]:
    """Launches a kernel with the arguments of `gemv_4bit`; the operands and y."""
    p, qt = problem, problem.weight()
    x = p.random(p.m, p.k, seed=4) if x is None else x.to(p.dtype)
    s = p.random(p.m, p.rank, seed=5)
    bias = p.random(p.n, seed=6) if p.bias else None
    b = p.operands()[1]
    y = nan(p.m, p.n, dtype=p.dtype)
    partial, counters = p.workspace(p.m * p.n, grid[0] * grid[1])
    branch = (s, b) if p.rank else (None, None)
    args = (x, *parts(qt), bias, *branch, Out(y), partial, counters, p.m, p.n, p.k, p.scaling)
    kernel(grid, threads, *args, **launch)
    assert not counters.tensor.any()
    return {"x": x, "qt": qt, "s": s, "bias": bias, "b": b, "y": y}


def run_backward(
    kernel: Any, problem: Problem, grid: tuple[int, int, int], threads: int, **launch: Any
) -> dict[str, Any]:
    """Launches a kernel with the arguments of `gemm_4bit_backward`; the operands and dX."""
    p, qt = problem, problem.weight()
    dy, ds = p.random(p.m, p.n, seed=7), p.random(p.m, p.rank, seed=8, dtype=torch.float32)
    a = p.operands()[0]
    dx = nan(p.m, p.k, dtype=p.dtype)
    partial, counters = p.workspace(p.m * p.k, grid[0] * grid[1])
    branch = (ds, a, SEED_TENSOR if p.dropout_p else None) if p.rank else (None, None, None)
    args = (dy, *parts(qt), *branch, Out(dx), partial, counters, p.m, p.n, p.k, *p.dropout_arguments())
    kernel(grid, threads, *args, **launch)
    assert not counters.tensor.any()
    return {"dy": dy, "qt": qt, "ds": ds, "a": a, "dx": dx}
