"""Experts written out in float64, forward and backward, with a bound on the rounding of any order of float operations.

Every value carries the largest error that a computation of the same formula may have: `Bounded(v, e)`. The rules are
those of running error analysis (Higham, Accuracy and Stability of Numerical Algorithms, 3.3): a sum of n products is
off by at most (n + 6)·2^-24 of the sum of the magnitudes (6: the decoding of a weight, a scaling, and the sum of base
and branch), and storing a result in the type of the activations adds its unit roundoff, twice more where a kernel
rounds the weight to that type too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SUM_ROUNDOFF = 2.0**-24
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


class Bounded(NamedTuple):
    """A float64 value and a bound of its error."""

    v: Tensor
    e: Tensor

    def __getitem__(self, index: object) -> "Bounded":  # type: ignore[override]
        return Bounded(self.v[index], self.e[index])

    @property
    def size(self) -> Tensor:
        """The largest magnitude that the computed value may have."""
        return self.v.abs() + self.e


def exact(x: Tensor) -> Bounded:
    return Bounded(x.double(), torch.zeros_like(x, dtype=torch.float64))


class Arithmetic:
    """Operations whose results are stored in `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.unit = UNIT[dtype]

    def product(self, a: Bounded, b: Bounded) -> Bounded:
        """a·b, summed in float32."""
        error = a.v.abs() @ b.e + a.e @ b.size
        rounding = (a.v.shape[-1] + 6) * SUM_ROUNDOFF + 3 * self.unit
        return Bounded(a.v @ b.v, error + rounding * (a.size @ b.size))

    def add(self, a: Bounded, b: Bounded) -> Bounded:
        return Bounded(a.v + b.v, a.e + b.e + self.unit * (a.size + b.size))

    def times(self, a: Bounded, b: Bounded) -> Bounded:
        return Bounded(a.v * b.v, a.e * b.size + a.v.abs() * b.e + 2 * self.unit * a.size * b.size)

    def scaled(self, a: Bounded, scale: float) -> Bounded:
        return Bounded(a.v * scale, a.e * abs(scale) + self.unit * a.size * abs(scale))

    def silu(self, g: Bounded) -> Bounded:
        """|silu'| < 1.1."""
        v = torch.nn.functional.silu(g.v)
        return Bounded(v, 1.1 * g.e + 8 * self.unit * v.abs())

    def silu_slope(self, g: Bounded) -> Bounded:
        """|silu''| <= 1/2; computed from terms of at most 1 + |g|."""
        p = torch.sigmoid(g.v)
        return Bounded(p * (1 + g.v * (1 - p)), 0.5 * g.e + 8 * self.unit * (1 + g.v.abs()))


class Branch(NamedTuple):
    """A [E, r, K], B [E, N, r] and the scaling of one projection."""

    a: Tensor
    b: Tensor
    scaling: float


def transposed(x: Bounded) -> Bounded:
    return Bounded(x.v.T, x.e.T)


def experts_twin(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    d_out: Tensor,
    matrices: Sequence[Tensor],
    branches: Sequence[Branch | None] = (None, None),
) -> dict[str, Bounded]:
    """y and the gradients of x, the routing weights ("w") and each branch ("a0", "b0", "a1", "b1"; [E, …]).

    Args:
        x: [T, H]; its type is that of the activations.
        index, weights: [T, k].
        d_out: the gradient of y.
        matrices: [E, 2I, H] and [E, H, I].
        branches: of the two.
    """
    op, x_, w_, d_ = Arithmetic(x.dtype), exact(x), exact(weights), exact(d_out)
    zero = {"y": x, "x": x, "w": weights}
    zero |= {f"{k}{i}": t for i, branch in enumerate(branches) if branch for k, t in (("a", branch.a), ("b", branch.b))}
    total = {name: exact(torch.zeros_like(tensor)) for name, tensor in zero.items()}
    for token in range(len(x)):
        for slot, expert in enumerate(index[token].tolist()):
            row = (slice(token, token + 1),)
            parts = _one(op, x_[row], w_[token, slot], d_[row], [m[expert] for m in matrices], branches, expert)
            places = {"y": token, "x": token, "w": (token, slot)}
            for name, part in parts.items():
                place = places.get(name, expert)
                old = total[name][place]
                # len(x): a row of a gradient of A or B is a sum over tokens, in float32, in one order or another
                new = Bounded(old.v + part.v, old.e + part.e + len(x) * SUM_ROUNDOFF * part.size + op.unit * part.size)
                total[name].v[place], total[name].e[place] = new.v, new.e
    return total


def _one(
    op: Arithmetic,
    x: Bounded,
    w: Bounded,
    d: Bounded,
    matrices: Sequence[Tensor],
    branches: Sequence[Branch | None],
    expert: int,
) -> dict[str, Bounded]:
    """One token through one expert."""
    first, second = (_Projection(op, matrix, branch, expert) for matrix, branch in zip(matrices, branches, strict=True))
    h = first.forward(x)
    half = h.v.shape[-1] // 2
    gate, up = h[:, :half], h[:, half:]
    active = op.silu(gate)
    y = second.forward(op.times(active, up))
    dy = op.times(d, Bounded(w.v.expand_as(d.v), w.e.expand_as(d.v)))
    da, grads = second.backward(dy)
    d_gate, d_up = op.times(op.times(da, up), op.silu_slope(gate)), op.times(da, active)
    dx, more = first.backward(Bounded(*(torch.cat(pair, -1) for pair in zip(d_gate, d_up, strict=True))))
    out = {"y": op.times(y, Bounded(w.v.expand_as(y.v), w.e.expand_as(y.v)))[0], "x": dx[0]}
    out["w"] = op.product(d, transposed(y))[0, 0]
    return out | {f"{k}1": v for k, v in grads.items()} | {f"{k}0": v for k, v in more.items()}


class _Projection:
    """x·Wᵀ + s·(x·Aᵀ)·Bᵀ of one expert."""

    def __init__(self, op: Arithmetic, matrix: Tensor, branch: Branch | None, expert: int) -> None:
        self.op, self.w, self.branch = op, exact(matrix), branch
        if branch is not None:
            self.a, self.b, self.s = exact(branch.a[expert]), exact(branch.b[expert]), branch.scaling

    def forward(self, x: Bounded) -> Bounded:
        self.x = x
        y = self.op.product(x, transposed(self.w))
        if self.branch is None:
            return y
        self.low = self.op.product(x, transposed(self.a))
        return self.op.add(y, self.op.scaled(self.op.product(self.low, transposed(self.b)), self.s))

    def backward(self, dy: Bounded) -> tuple[Bounded, dict[str, Bounded]]:
        dx = self.op.product(dy, self.w)
        if self.branch is None:
            return dx, {}
        d_low = self.op.scaled(self.op.product(dy, self.b), self.s)
        dx = self.op.add(dx, self.op.product(d_low, self.a))
        db = self.op.scaled(self.op.product(transposed(dy), self.low), self.s)
        return dx, {"a": self.op.product(transposed(d_low), self.x), "b": db}


def assert_within(found: Tensor, expected: Bounded) -> None:
    """Every element within its bound."""
    off = (found.detach().double() - expected.v).abs()
    assert bool((off <= expected.e).all()), (
        f"worst {float((off / expected.e.clamp_min(1e-300)).max()):.3g} of its bound"
    )
