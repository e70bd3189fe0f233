"""The products with a packed weight on a GPU: one fused kernel for few rows, decode and cuBLAS for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.cuda import workspace
from ferrolora.cuda.launch import prepare, ready, run
from ferrolora.cuda.mode import required_kernel
from ferrolora.errors import UnsupportedError
from ferrolora.ops.decode import decode, stored

MASKED = ("lora_input", "lora_input_gradient", "lora_add_input_gradient")  # operators that draw the mask of dropout
NO_CODEC = ("nf4", 64, False)  # for an operator that reads no packed weight


class Weight(NamedTuple):
    """A packed weight `[n, k]` as the operators pass it."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    quant_type: str
    block_size: int
    n: int
    k: int

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The four tensors."""
        return self.codes, self.absmax, self.nested_absmax, self.offset

    def decoded(self, like: Tensor) -> Tensor:
        """The weight in the type of `like`, in the workspace of its device and stream."""
        index = like.get_device()
        stream = torch._C._cuda_getCurrentRawStream(index)
        out = workspace.weight((self.n, self.k), like.dtype, index, stream)
        decode(out, self.n, self.k, *self.parts, self.quant_type, self.block_size)
        return out


class Branch(NamedTuple):
    """A low-rank branch: A `[r, k]`, B `[n, r]`, its scaling, and the dropout of its input."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout_p: float
    seed: Tensor | None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


def as_rows(tensor: Tensor, columns: int) -> Tensor:
    """The same memory as `[rows, columns]`; as it is where it has two dimensions, since a view costs the host 1 µs."""
    return tensor if tensor.dim() == 2 else tensor.view(-1, columns)


def forward(x: Tensor, weight: Weight, bias: Tensor | None, branch: Branch | None, s: Tensor | None, y: Tensor) -> None:
    """Write `y = x·Wᵀ + bias + scaling·S·Bᵀ`: x `[m, k]`, y `[m, n]`, and s `[m, r]` if there is a branch."""
    index = x.get_device()
    if weight.k == 0 or y.numel() == 0:
        y.zero_()
        if bias is not None:
            y += bias
        return
    rank, lora_dtype = (0, None) if branch is None else (branch.rank, branch.a.dtype)
    bias_dtype = None if bias is None else bias.dtype
    launch = _product("linear", x, weight, rank, lora_dtype, bias_dtype)
    if launch is not None:
        given = {**stored(*weight.parts), "x": ready(x), "bias": None if bias is None else ready(bias), "y": y}
        if branch is not None:
            given |= {"s": s, "b": ready(branch.b), "scaling": branch.scaling}
        run(launch, index, given)
        return
    decoded = weight.decoded(x).t()
    if bias is None:
        torch.mm(x, decoded, out=y)
    else:
        torch.addmm(bias.to(x.dtype), x, decoded, out=y)
    if branch is not None and s is not None:
        _add_output(s, branch, y, weight)


def low_rank_input(x: Tensor, weight: Weight, branch: Branch, s: Tensor) -> None:
    """Write `S = drop(x)·Aᵀ`, `[m, r]`."""
    if s.numel() == 0 or weight.k == 0:
        s.zero_()
        return
    launch = _branch_launch("lora_input", x, weight, branch)
    assert launch is not None  # no library function stands for it
    run(launch, x.get_device(), {"x": ready(x), "a": ready(branch.a), "seed": branch.seed, "s": s})


def clear_others(low: Tensor, row_ranks: Sequence[tuple[int, int]]) -> None:
    """Zero S or dS `[m, r]` but at the ranks (start, end) of each row: a pair for every m / len(row_ranks) rows."""
    if row_ranks:
        starts, ends = torch.tensor(row_ranks, device=low.device).unbind(1)
        rank = torch.arange(low.shape[1], device=low.device)
        others = (rank < starts[:, None]) | (rank >= ends[:, None])
        low.view(len(row_ranks), -1, low.shape[1]).masked_fill_(others[:, None], 0.0)


def input_gradient(dy: Tensor, weight: Weight, branch: Branch | None, ds: Tensor | None, dx: Tensor) -> None:
    """Write `dX = dY·W + mask ⊙ (dS·A)`, for dy `[m, n]` and dx `[m, k]`; ds float32 `[m, r]` if there is a branch."""
    index = dy.get_device()
    if weight.n == 0 or dx.numel() == 0:
        dx.zero_()
        return
    rank, lora_dtype, dropout_p = (0, None, 0.0) if branch is None else (branch.rank, branch.a.dtype, branch.dropout_p)
    launch = _product("linear_backward", dy, weight, rank, lora_dtype, None, dropout_p)
    if launch is not None:
        given = {**stored(*weight.parts), "dy": ready(dy), "dx": dx}
        if branch is not None:
            given |= {"ds": ds, "a": ready(branch.a), "seed": branch.seed}
        run(launch, index, given)
        return
    torch.mm(dy, weight.decoded(dy), out=dx)
    if branch is not None and ds is not None:
        _add_input_gradient(ds, branch, dx, weight)


def output_gradients(dy: Tensor, s: Tensor | None, weight: Weight, branch: Branch, db: Tensor | None) -> Tensor:
    """Write `dB = scaling·dYᵀ·S` if asked for, and return `dS = scaling·dY·B`, float32 `[m, r]`."""
    index, rank = dy.get_device(), branch.rank
    ds = torch.empty((dy.shape[0], rank), dtype=torch.float32, device=dy.device)
    if dy.numel() == 0:
        if db is not None:
            db.zero_()
        return ds.zero_()
    given = {"dy": ready(dy), "b": ready(branch.b), "ds": ds, "db": db, "scaling": branch.scaling}
    given["s"] = None if s is None else ready(s)
    both = None if db is None else _branch_launch("lora_output_gradients", dy, weight, branch)
    if both is not None:
        run(both, index, given)
        return ds
    for op, names in (("lora_ds", ("dy", "b", "ds", "scaling")), ("lora_db", ("dy", "s", "db", "scaling"))):
        if op == "lora_ds" or db is not None:
            launch = _branch_launch(op, dy, weight, branch)
            assert launch is not None  # no library function stands for it
            run(launch, index, {name: given[name] for name in names})
    return ds


def a_gradient(x: Tensor, ds: Tensor, weight: Weight, branch: Branch, da: Tensor) -> None:
    """Write `dA = dSᵀ·drop(x)`, `[r, k]`."""
    if x.numel() == 0:
        da.zero_()
        return
    launch = _branch_launch("lora_input_gradient", x, weight, branch)
    assert launch is not None  # no library function stands for it
    run(launch, x.get_device(), {"x": ready(x), "ds": ds, "seed": branch.seed, "da": da})


def _add_output(s: Tensor, branch: Branch, y: Tensor, weight: Weight) -> None:
    launch = _branch_launch("lora_add_output", y, weight, branch)
    if launch is None:
        y.addmm_(s, branch.b.to(y.dtype).t(), alpha=branch.scaling)
    else:
        run(launch, y.get_device(), {"s": s, "b": ready(branch.b), "y": y, "scaling": branch.scaling})


def _add_input_gradient(ds: Tensor, branch: Branch, dx: Tensor, weight: Weight) -> None:
    launch = _branch_launch("lora_add_input_gradient", dx, weight, branch)
    if launch is None:
        if branch.dropout_p > 0.0:  # the planner itself does not come here with a mask to draw
            raise UnsupportedError(
                f"ferrolora.cuda.exact(): no kernel adds a gradient under dropout {branch.dropout_p} to {dx.dtype} on "
                "this GPU; train with lora_dropout=0, or leave the block for backward"
            )
        dx.addmm_(ds.to(dx.dtype), branch.a.to(dx.dtype))
    else:
        run(launch, dx.get_device(), {"ds": ds, "a": ready(branch.a), "seed": branch.seed, "dx": dx})


# By position, here and below: a lookup by keywords costs three times as much, and there is one for every launch.
def _product(
    op: str,
    like: Tensor,
    weight: Weight,
    rank: int,
    lora_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    dropout_p: float = 0.0,
) -> _native.CudaLaunch | None:
    """The launch of a product with a packed weight; None: decode, then torch's own product."""
    index, m, (_, _, nested, _, quant_type, block_size, n, k) = like.get_device(), like.shape[0], weight
    codec = (quant_type, block_size, nested is not None)
    kernel = required_kernel()
    return prepare(index, op, like.dtype, n, k, m, *codec, rank, lora_dtype, bias_dtype, dropout_p, kernel)


def _branch_launch(op: str, like: Tensor, weight: Weight, branch: Branch) -> _native.CudaLaunch | None:
    """The launch of an operator of the branch alone, which knows nothing of how the weight is stored."""
    a, m = branch.a, like.shape[0]
    dropout_p = branch.dropout_p if op in MASKED else 0.0
    return prepare(
        like.get_device(), op, like.dtype, weight.n, weight.k, m, *NO_CODEC, a.shape[0], a.dtype, None, dropout_p
    )
