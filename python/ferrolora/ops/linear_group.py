"""`ferrolora::linear_group` and its backward: linears that share x (q, k, v; gate, up) as one call.

    S_i = drop(x)·A_iᵀ      y_i = x·deq(W_i)ᵀ + bias_i + s_i·S_i·B_iᵀ
    dX = Σ_i dY_i·deq(W_i) + drop'(dS_i·A_i)

x is packed once where a kernel packs it, and dX is summed in float32 and rounded once.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.cuda.launch import ready
from ferrolora.errors import ShapeError, UnsupportedError
from ferrolora.ops import linear_cuda
from ferrolora.ops.checks import FLOAT_TYPES, require_device, require_linear, require_low_rank
from ferrolora.ops.library import define, differentiate
from ferrolora.ops.linear import LowRank, dropout_seed
from ferrolora.ops.linear_base import OnceDifferentiable, bias_gradient, needs_grad
from ferrolora.ops.weight import native_weight
from ferrolora.tensor import QuantTensor


class Sibling(NamedTuple):
    """One of the linears that `linear_group` applies to x.

    Args:
        weight: `[N, K]`.
        bias: float `[N]`. Default None.
        lora: the low-rank branch. Default None.
    """

    weight: QuantTensor
    bias: Tensor | None = None
    lora: LowRank | None = None


def linear_group(x: Tensor, siblings: Sequence[Sibling]) -> list[Tensor]:
    """`[linear(x, s.weight, s.bias, s.lora) for s in siblings]` in one call: the same values, one gradient of x.

    Args:
        x: float32, float16 or bfloat16 `[..., K]`, any strides.
        siblings: at least one; all have K columns. A branch with dropout draws its own mask.

    Returns:
        One `[..., N]` a sibling, in the type of x.

    Raises:
        ShapeError: no sibling, or one that does not fit x.
        UnsupportedError: a type or a device without a kernel; second derivatives.
    """
    if not siblings:
        raise ShapeError("linear_group: at least one sibling is needed, got none")
    for i, sibling in enumerate(siblings):
        if len(sibling.weight.shape) != 2:
            raise ShapeError(
                f"linear_group: the weight of sibling {i} must be [N, K], not {list(sibling.weight.shape)}"
            )
    return linear_group_packed(x, [_packed(sibling) for sibling in siblings])


class Packed(NamedTuple):
    """A `Sibling` in the parts that the operator takes, of shape `[n, k]`."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    quant_type: str
    block_size: int
    n: int
    k: int
    bias: Tensor | None
    lora: LowRank | None


def _packed(sibling: Sibling) -> Packed:
    qt = sibling.weight
    parts = (qt.codes, qt.absmax, qt.nested_absmax, qt.offset)
    return Packed(*parts, *qt.codec, qt.shape[0], qt.shape[1], sibling.bias, sibling.lora)


def linear_group_packed(x: Tensor, members: Sequence[Packed]) -> list[Tensor]:
    """`linear_group` over the parts of QuantTensors that were checked when they were made."""
    for member in members:
        codec = (member.quant_type, member.block_size)
        require_device("linear_group", x, codec, weight=member.codes, scales=member.absmax, bias=member.bias)
    if torch.is_autocast_enabled(x.device.type) and x.dtype in FLOAT_TYPES:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    branches = [member.lora or _no_branch(x, member.n, member.k) for member in members]
    seeds = [dropout_seed(x.device) if b.dropout_p > 0.0 else None for b in branches]
    codes, absmax, nested, offset, quant_type, block_size, n, k, bias, _ = zip(*members, strict=True)
    a, b, scaling, dropout_p, row_ranks = zip(*branches, strict=True)
    if any(row_ranks):
        raise UnsupportedError("linear_group: a branch has row_ranks; call linear once for each sibling")
    if len(set(k)) > 1:
        raise ShapeError(f"linear_group: the weights have {', '.join(map(str, k))} columns, but they share x")
    y: list[Tensor]
    y, _ = torch.ops.ferrolora.linear_group(
        x, codes, absmax, nested, offset, quant_type, block_size, n, k[0], bias, a, b, scaling, dropout_p, seeds
    )
    return y


def _no_branch(x: Tensor, n: int, k: int) -> LowRank:
    """The branch of rank 0."""
    return LowRank(x.new_empty((0, k), dtype=torch.float32), x.new_empty((n, 0), dtype=torch.float32), 1.0)


_WEIGHTS = (
    "Tensor[] codes, Tensor[] absmax, Tensor?[] nested_absmax, Tensor?[] offset, str[] quant_type, int[] block_size, "
    "int[] n, int k"
)
_BRANCHES = "Tensor[] lora_a, Tensor[] lora_b, float[] scaling, float[] dropout_p, Tensor?[] seed"


class _Member(NamedTuple):
    """What the native kernels read of one linear."""

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: float
    quant_type: str
    block_size: int
    n: int
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    dropout_p: float
    seed: int


def _members(weights: Sequence[Any], bias: Sequence[Tensor | None], branches: Sequence[Any]) -> list[_Member]:
    codes, absmax, nested, offset, quant_type, block_size, n, _ = weights
    columns = zip(codes, absmax, nested, offset, quant_type, block_size, n, bias, *branches, strict=True)
    return [
        _Member(
            *native_weight(c, m, s, o),
            kind,
            block,
            rows,
            None if b is None else b.contiguous(),
            lora_a.contiguous(),
            lora_b.contiguous(),
            scaling,
            p,
            0 if seed is None else int(seed),
        )
        for c, m, s, o, kind, block, rows, b, lora_a, lora_b, scaling, p, seed in columns
    ]


def _fake(x: Tensor, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    *_, n, k, bias, lora_a, lora_b, _, _, _ = args
    for rows, b, left, right in zip(n, bias, lora_a, lora_b, strict=True):
        require_linear("linear_group", x, rows, k, b)
        if tuple(left.shape) == (0, k) and tuple(right.shape) == (rows, 0):
            continue  # no branch
        require_low_rank("linear_group", rows, k, left, right)
    lead = x.shape[:-1]
    return [x.new_empty((*lead, rows)) for rows in n], [x.new_empty((*lead, a.shape[0])) for a in lora_a]


def _cpu(x: Tensor, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    weights, bias, branches = args[:8], args[8], args[9:]
    y, s = _fake(x, *args)
    rows, k = x.contiguous().view(-1, weights[7]), weights[7]
    members = _members(weights, bias, branches)
    _native.linear_group(rows, (rows.shape[0], k), members, y, s, torch.get_num_threads())
    return y, s


def _cuda(x: Tensor, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    weights, bias, branches = args[:8], args[8], args[9:]
    y, s = _fake(x, *args)
    rows = ready(x).view(-1, weights[7])
    for weight, branch, b, out, low in zip(*_on_device(weights, branches), bias, y, s, strict=True):
        low = low.view(rows.shape[0], -1) if branch is not None else low
        if branch is not None:
            linear_cuda.low_rank_input(rows, weight, branch, low)
        linear_cuda.forward(rows, weight, b, branch, low, out.view(-1, weight.n))
    return y, s


def _on_device(weights: Sequence[Any], branches: Sequence[Any]) -> Any:
    """Each linear's weight, and its branch or None if that has rank 0, as the CUDA kernels take them."""
    codes, absmax, nested, offset, quant_type, block_size, n, k = weights
    parts = zip(codes, absmax, nested, offset, quant_type, block_size, n, strict=True)
    packed = [linear_cuda.Weight(c, m, s, o, kind, block, rows, k) for c, m, s, o, kind, block, rows in parts]
    each = [linear_cuda.Branch(*branch) for branch in zip(*branches, strict=True)]
    return packed, [branch if branch.rank > 0 else None for branch in each]


def _fake_backward(dy: Sequence[Tensor], x: Tensor | None, s: Sequence[Tensor], *args: Any) -> Any:
    k, lora_a, lora_b, needs = args[7], args[8], args[9], args[13]
    dx = dy[0].new_empty((*dy[0].shape[:-1], k) if needs[0] else (0,))
    da = [a.new_empty(a.shape if needs[1] else (0,)) for a in lora_a]
    db = [b.new_empty(b.shape if needs[2] else (0,)) for b in lora_b]
    return dx, da, db


def _cpu_backward(dy: Sequence[Tensor], x: Tensor | None, s: Sequence[Tensor], *args: Any) -> Any:
    weights, branches, needs = args[:8], args[8:13], args[13]
    dx, da, db = _fake_backward(dy, x, s, *args)
    members = _members(weights, [None] * len(dy), branches)
    _native.linear_group_backward(
        [part.contiguous() for part in dy],
        None if x is None else x.contiguous(),
        [part.contiguous() for part in s],
        (math.prod(dy[0].shape[:-1]), weights[7]),
        members,
        dx if needs[0] else None,
        da if needs[1] else None,
        db if needs[2] else None,
        torch.get_num_threads(),
    )
    return dx, da, db


def _cuda_backward(dy: Sequence[Tensor], x: Tensor | None, s: Sequence[Tensor], *args: Any) -> Any:
    weights, branches, needs = args[:8], args[8:13], args[13]
    dx, da, db = _fake_backward(dy, x, s, *args)
    m, k = math.prod(dy[0].shape[:-1]), weights[7]
    total: Tensor | None = None  # float32, so that the sum over the siblings rounds once more only
    for i, (weight, branch) in enumerate(zip(*_on_device(weights, branches), strict=True)):
        part, ds = ready(dy[i]).view(m, weight.n), None
        if branch is not None:
            low = ready(s[i]).view(m, branch.rank)
            ds = linear_cuda.output_gradients(part, low, weight, branch, db[i] if needs[2] else None)
            if needs[1] and x is not None:
                linear_cuda.a_gradient(ready(x).view(m, k), ds, weight, branch, da[i])
        if needs[0]:
            own = dx.view(m, k) if len(dy) == 1 else torch.empty((m, k), dtype=dx.dtype, device=dx.device)
            linear_cuda.input_gradient(part, weight, branch, ds, own)
            total = own if len(dy) == 1 else own.float() if total is None else total.add_(own)
    if total is not None and len(dy) > 1:
        dx.copy_(total.view(dx.shape))
    return dx, da, db


class _LinearGroup(torch.autograd.Function):
    """Saves x, each S, and references to parameters. Tensors come one by one, because autograd sees no lists."""

    @staticmethod
    def forward(ctx: Any, op_args: Any, x: Tensor, *parameters: Tensor | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            y, s = torch.ops.ferrolora.linear_group(x, *op_args)
        count = len(y)
        ctx.mark_non_differentiable(*s)
        weights, bias, (lora_a, lora_b, *scalars, seed) = op_args[:8], op_args[8], op_args[9:]
        ctx.needs_a = any(ctx.needs_input_grad[2 + count : 2 + 2 * count])
        ctx.needs_b = any(ctx.needs_input_grad[2 + 2 * count :])
        saved = (x if ctx.needs_a else None, *s, *weights[0], *weights[1], *weights[2], *weights[3])
        ctx.save_for_backward(*saved, *lora_a, *lora_b, *seed)
        ctx.problem, ctx.scalars, ctx.count = weights[4:], scalars, count
        ctx.bias_dtypes = [None if b is None else b.dtype for b in bias]
        return (*y, *s)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        count, (x, *saved) = ctx.count, ctx.saved_tensors
        s, codes, absmax, nested, offset, lora_a, lora_b, seed = (
            saved[i : i + count] for i in range(0, len(saved), count)
        )
        dy = [grad.contiguous() for grad in grads[:count]]
        needs = [ctx.needs_input_grad[1], ctx.needs_a, ctx.needs_b]
        dx: Tensor | None = None
        da: Sequence[Tensor | None] = [None] * count
        db: Sequence[Tensor | None] = [None] * count
        if any(needs):
            weights = (codes, absmax, nested, offset, *ctx.problem)
            branches = (lora_a, lora_b, *ctx.scalars, seed)
            found = torch.ops.ferrolora.linear_group_backward(dy, x, s, *weights, *branches, needs)
            dx = found[0] if needs[0] else None
            da, db = found[1] if needs[1] else da, found[2] if needs[2] else db
        d_bias = [
            bias_gradient(dy[i], ctx.problem[2][i], ctx.bias_dtypes[i]) if ctx.needs_input_grad[2 + i] else None
            for i in range(count)
        ]
        return None, dx, *d_bias, *da, *db


def _autograd(x: Tensor, *args: Any) -> Any:
    parameters = [*args[8], *args[9], *args[10]]  # bias, A, B
    if needs_grad(x, *parameters):
        outputs = _LinearGroup.apply(args, x, *parameters)
        count = len(outputs) // 2
        return list(outputs[:count]), list(outputs[count:])
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.ferrolora.linear_group(x, *args)


def _autograd_backward(dy: Any, x: Any, s: Any, *args: Any) -> Any:
    op = torch.ops.ferrolora.linear_group_backward.default
    if not needs_grad(*dy, x, *args[8], *args[9]):
        with torch._C._AutoDispatchBelowAutograd():
            return op(dy, x, s, *args)

    def run(*_: Any) -> tuple[Tensor, ...]:
        dx, da, db = op(dy, x, s, *args)
        return (dx, *da, *db)

    dx, *rest = OnceDifferentiable.apply(str(op), run, *dy, x, *args[8], *args[9])
    return dx, rest[: len(dy)], rest[len(dy) :]


define(
    f"linear_group(Tensor x, {_WEIGHTS}, Tensor?[] bias, {_BRANCHES}) -> (Tensor[] y, Tensor[] s)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
define(
    f"linear_group_backward(Tensor[] dy, Tensor? x, Tensor[] s, {_WEIGHTS}, {_BRANCHES}, bool[] needs)"
    " -> (Tensor dx, Tensor[] da, Tensor[] db)",
    cpu=_cpu_backward,
    cuda=_cuda_backward,
    fake=_fake_backward,
)
differentiate("linear_group", _autograd)
differentiate("linear_group_backward", _autograd_backward)
