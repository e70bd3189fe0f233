"""`ferrolora::linear` and `linear_backward`: y = x·deq(W)ᵀ + bias and dX = dY·deq(W), W never materialised."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.cuda.launch import ready
from ferrolora.errors import ShapeError, UnsupportedError
from ferrolora.ops import linear_cuda
from ferrolora.ops.checks import require_float, require_linear
from ferrolora.ops.library import define, differentiate
from ferrolora.ops.linear_cuda import as_rows
from ferrolora.ops.weight import MATRIX_SCHEMA, native_weight

_COLUMNS = 64


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
) -> Tensor:
    require_linear("linear", x, n, k, bias)
    return x.new_empty((*x.shape[:-1], n))  # [..., N]


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
) -> Tensor:
    y = _fake(x, codes, absmax, nested_absmax, offset, quant_type, block_size, n, k, bias)
    _native.linear(
        x.contiguous().view(-1, k),
        *native_weight(codes, absmax, nested_absmax, offset),
        quant_type,
        block_size,
        n,
        k,
        None if bias is None else bias.contiguous(),
        y.view(-1, n),
        torch.get_num_threads(),
    )
    return y


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
) -> Tensor:
    y = _fake(x, codes, absmax, nested_absmax, offset, quant_type, block_size, n, k, bias)
    weight = linear_cuda.Weight(codes, absmax, nested_absmax, offset, quant_type, block_size, n, k)
    linear_cuda.forward(as_rows(ready(x), k), weight, bias, None, None, as_rows(y, n))
    return y


def _fake_backward(
    dy: Tensor,  # [..., N]
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
) -> Tensor:
    require_float("linear_backward", "dy", dy.dtype)
    if dy.dim() == 0 or dy.shape[-1] != n:
        raise ShapeError(f"linear_backward: dy must be [..., {n}] for a weight [{n}, {k}], not {list(dy.shape)}")
    return dy.new_empty((*dy.shape[:-1], k))  # [..., K]


def _cpu_backward(
    dy: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
) -> Tensor:
    dx = _fake_backward(dy, codes, absmax, nested_absmax, offset, quant_type, block_size, n, k)
    _native.linear_backward(
        dy.contiguous().view(-1, n),
        *native_weight(codes, absmax, nested_absmax, offset),
        quant_type,
        block_size,
        n,
        k,
        dx.view(-1, k),
        torch.get_num_threads(),
    )
    return dx


def _cuda_backward(
    dy: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
) -> Tensor:
    dx = _fake_backward(dy, codes, absmax, nested_absmax, offset, quant_type, block_size, n, k)
    weight = linear_cuda.Weight(codes, absmax, nested_absmax, offset, quant_type, block_size, n, k)
    linear_cuda.input_gradient(as_rows(ready(dy), n), weight, None, None, as_rows(dx, k))
    return dx


def bias_gradient(dy: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """db = Σ dY over all rows, summed in float32; [N]. dY contiguous: the order of sums follows the strides."""
    if n == 1:  # torch splits a sum to one value among threads, so its bits would depend on them; columns it does not
        dy = torch.nn.functional.pad(dy.reshape(-1), (0, -dy.numel() % _COLUMNS))
        return dy.view(-1, _COLUMNS).sum(0, dtype=torch.float32).sum(0, keepdim=True).to(dtype)
    return dy.reshape(-1, n).sum(0, dtype=torch.float32).to(dtype)


class _Linear(torch.autograd.Function):
    """Saves nothing but references to the packed weight: dX needs no activation, and W has no gradient."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _, codes, absmax, nested_absmax, offset, quant_type, block_size, n, k, bias = args
        ctx.save_for_backward(codes, absmax, nested_absmax, offset)
        ctx.problem = (quant_type, block_size, n, k)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.ferrolora.linear(*args)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy = grads[0].contiguous()
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.ferrolora.linear_backward(dy, *ctx.saved_tensors, *ctx.problem)
        if ctx.needs_input_grad[9]:
            db = bias_gradient(dy, ctx.problem[2], ctx.bias_dtype)
        return dx, *[None] * 8, db


class OnceDifferentiable(torch.autograd.Function):
    """Runs a backward operator; differentiating its result raises instead of giving numbers that are wrong."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[..., Any], *args: Any) -> Any:
        ctx.name = name
        with torch._C._AutoDispatchBelowAutograd():
            return run(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(
            f"{ctx.name}: second derivatives are not implemented; "
            "call dequantize() and torch.nn.functional.linear where you need create_graph=True"
        )


def once_differentiable(op: Any, *args: Any) -> Any:
    """Autograd kernel of a backward operator."""
    if needs_grad(*args):
        return OnceDifferentiable.apply(str(op), op, *args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def needs_grad(*args: Any) -> bool:
    """Whether autograd records this call."""
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


def _autograd(*args: Any) -> Any:
    if needs_grad(*args):
        return _Linear.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.ferrolora.linear(*args)


def _autograd_backward(*args: Any) -> Any:
    return once_differentiable(torch.ops.ferrolora.linear_backward.default, *args)


define(f"linear(Tensor x, {MATRIX_SCHEMA}, Tensor? bias) -> Tensor", cpu=_cpu, cuda=_cuda, fake=_fake)
define(
    f"linear_backward(Tensor dy, {MATRIX_SCHEMA}) -> Tensor",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
differentiate("linear", _autograd)
differentiate("linear_backward", _autograd_backward)
