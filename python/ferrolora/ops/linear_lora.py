"""`ferrolora::linear_lora` and its backward: base and low-rank branch in one pass over x.

    S = drop(x)·Aᵀ      y = x·deq(W)ᵀ + bias + s·S·Bᵀ
    dS = s·dY·B         dX = dY·deq(W) + drop'(dS·A)      dA = dSᵀ·drop(x)      dB = s·dYᵀ·S

Dropout comes from a counter-based generator: backward draws the same mask again from the seed; it is never stored.

`row_ranks`, if there are any, are pairs (start, end), each of as many consecutive rows: S and dS are zero but at these
ranks, so that A and B of several adapters, stacked, give each row the product of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.cuda.launch import ready
from ferrolora.errors import UnsupportedError
from ferrolora.ops import linear_cuda
from ferrolora.ops.checks import require_linear, require_low_rank, require_row_ranks
from ferrolora.ops.library import define, differentiate
from ferrolora.ops.linear_base import bias_gradient, needs_grad, once_differentiable
from ferrolora.ops.linear_cuda import as_rows
from ferrolora.ops.weight import MATRIX_SCHEMA, native_weight

_LORA = "Tensor lora_a, Tensor lora_b, float scaling, float dropout_p, Tensor? seed"


def _fake(
    x: Tensor,  # [..., K]
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    bias: Tensor | None,  # [N]
    lora_a: Tensor,  # [r, K]
    lora_b: Tensor,  # [N, r]
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,  # int64 scalar
    row_ranks: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    require_linear("linear_lora", x, n, k, bias)
    require_low_rank("linear_lora", n, k, lora_a, lora_b)
    if not 0.0 <= dropout_p < 1.0:
        raise UnsupportedError(f"linear_lora: dropout_p must be at least 0 and below 1, not {dropout_p}")
    if dropout_p > 0.0 and seed is None:
        raise UnsupportedError(f"linear_lora: dropout_p {dropout_p} needs a seed")
    require_row_ranks(x, row_ranks, lora_a.shape[0])
    lead = x.shape[:-1]
    return x.new_empty((*lead, n)), x.new_empty((*lead, lora_a.shape[0]))  # [..., N], [..., r]


def _cpu(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    row_ranks: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    weight = (codes, absmax, nested_absmax, offset)
    problem = (quant_type, block_size, n, k)
    y, s = _fake(x, *weight, *problem, bias, lora_a, lora_b, scaling, dropout_p, seed, row_ranks)
    _native.linear_lora(
        x.contiguous().view(-1, k),
        *native_weight(*weight),
        *problem,
        None if bias is None else bias.contiguous(),
        lora_a.contiguous(),
        lora_b.contiguous(),
        scaling,
        dropout_p,
        0 if seed is None else int(seed),
        pairs(row_ranks),
        y.view(-1, n),
        s.view(-1, s.shape[-1]),
        torch.get_num_threads(),
    )
    return y, s


def _cuda(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    row_ranks: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    parts = (codes, absmax, nested_absmax, offset)
    y, s = _fake(x, *parts, quant_type, block_size, n, k, bias, lora_a, lora_b, scaling, dropout_p, seed, row_ranks)
    weight = linear_cuda.Weight(*parts, quant_type, block_size, n, k)
    branch = linear_cuda.Branch(lora_a, lora_b, scaling, dropout_p, seed)
    x, low = as_rows(ready(x), k), as_rows(s, branch.rank)
    linear_cuda.low_rank_input(x, weight, branch, low)
    linear_cuda.clear_others(low, pairs(row_ranks))
    linear_cuda.forward(x, weight, bias, branch, low, as_rows(y, n))
    return y, s


def _fake_backward(
    dy: Tensor,  # [..., N]
    x: Tensor | None,  # [..., K]
    s: Tensor | None,  # [..., r]
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],  # dx, da, db
    row_ranks: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty((*dy.shape[:-1], k) if needs[0] else (0,))
    da = lora_a.new_empty(lora_a.shape if needs[1] else (0,))
    db = lora_b.new_empty(lora_b.shape if needs[2] else (0,))
    return dx, da, db


def _cpu_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    row_ranks: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    weight = (codes, absmax, nested_absmax, offset)
    problem = (quant_type, block_size, n, k)
    dx, da, db = _fake_backward(dy, x, s, *weight, *problem, lora_a, lora_b, scaling, dropout_p, seed, needs)
    _native.linear_lora_backward(
        dy.contiguous().view(-1, n),
        None if x is None else x.contiguous().view(-1, k),
        None if s is None else s.contiguous().view(-1, lora_a.shape[0]),
        *native_weight(*weight),
        *problem,
        lora_a.contiguous(),
        lora_b.contiguous(),
        scaling,
        dropout_p,
        0 if seed is None else int(seed),
        pairs(row_ranks),
        dx.view(-1, k) if needs[0] else None,
        da if needs[1] else None,
        db if needs[2] else None,
        torch.get_num_threads(),
    )
    return dx, da, db


def _cuda_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    row_ranks: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    parts = (codes, absmax, nested_absmax, offset)
    problem = (quant_type, block_size, n, k)
    dx, da, db = _fake_backward(dy, x, s, *parts, *problem, lora_a, lora_b, scaling, dropout_p, seed, needs)
    weight = linear_cuda.Weight(*parts, *problem)
    branch = linear_cuda.Branch(lora_a, lora_b, scaling, dropout_p, seed)
    dy, s = as_rows(ready(dy), n), None if s is None else as_rows(ready(s), branch.rank)
    ds = linear_cuda.output_gradients(dy, s, weight, branch, db if needs[2] else None)
    linear_cuda.clear_others(ds, pairs(row_ranks))
    if needs[1] and x is not None:
        linear_cuda.a_gradient(as_rows(ready(x), k), ds, weight, branch, da)
    if needs[0]:
        linear_cuda.input_gradient(dy, weight, branch, ds, as_rows(dx, k))
    return dx, da, db


def pairs(row_ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Starts and ends, one after another, as pairs."""
    return list(zip(row_ranks[::2], row_ranks[1::2], strict=True))


class _LinearLora(torch.autograd.Function):
    """Base + LoRA. Saves x and S, and only where A and B need them; the rest are references to parameters."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        problem, row_ranks = args[:15], args[15:]  # the dispatcher leaves out a default
        x, *weight, quant_type, block_size, n, k, bias, lora_a, lora_b, scaling, dropout_p, seed = problem
        with torch._C._AutoDispatchBelowAutograd():
            y, s = torch.ops.ferrolora.linear_lora(*args)
        ctx.mark_non_differentiable(s)
        saved_x = x if ctx.needs_input_grad[10] else None
        saved_s = s if ctx.needs_input_grad[11] else None
        ctx.save_for_backward(saved_x, saved_s, *weight, lora_a, lora_b, seed)
        ctx.problem = (quant_type, block_size, n, k)
        ctx.scalars = (scaling, dropout_p)
        ctx.row_ranks = row_ranks
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, s

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy = grads[0].contiguous()
        x, s, *weight, lora_a, lora_b, seed = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 10, 11)]
        out: list[Tensor | None] = [None, None, None]
        if any(needs):
            lora = (lora_a, lora_b, *ctx.scalars, seed)
            lora_backward = torch.ops.ferrolora.linear_lora_backward
            results = lora_backward(dy, x, s, *weight, *ctx.problem, *lora, needs, *ctx.row_ranks)
            out = [grad if need else None for grad, need in zip(results, needs, strict=True)]
        d_bias = bias_gradient(dy, ctx.problem[2], ctx.bias_dtype) if ctx.needs_input_grad[9] else None
        return out[0], *[None] * 8, d_bias, out[1], out[2], *[None] * (3 + len(ctx.row_ranks))


def _autograd(*args: Any) -> Any:
    if needs_grad(*args):
        return _LinearLora.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.ferrolora.linear_lora(*args)


def _autograd_backward(*args: Any) -> Any:
    return once_differentiable(torch.ops.ferrolora.linear_lora_backward.default, *args)


define(
    f"linear_lora(Tensor x, {MATRIX_SCHEMA}, Tensor? bias, {_LORA}, int[] row_ranks=[]) -> (Tensor y, Tensor s)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
define(
    f"linear_lora_backward(Tensor dy, Tensor? x, Tensor? s, {MATRIX_SCHEMA}, {_LORA}, bool[] needs, int[] row_ranks=[])"
    " -> (Tensor dx, Tensor da, Tensor db)",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
differentiate("linear_lora", _autograd)
differentiate("linear_lora_backward", _autograd_backward)
