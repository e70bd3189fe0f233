"""Linears that share x in one call: the values of the single calls, the sum of their gradients of x."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import ferrolora as fl

K = 192
SIZES = (40, 70, 33)
Threads = Callable[[int], AbstractContextManager[None]]


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def siblings(dropout_p: float = 0.0) -> list[fl.Sibling]:
    """NF4 with a bias and a branch, int8 without either, NF4 with a branch of another rank."""
    first, second, third = SIZES
    return [
        fl.Sibling(fl.quantize(torch.randn(first, K)), leaf(first), low_rank(first, 4, dropout_p)),
        fl.Sibling(fl.quantize(torch.randn(second, K), fl.QuantSpec("int8"))),
        fl.Sibling(fl.quantize(torch.randn(third, K)), None, low_rank(third, 9, dropout_p)),
    ]


def low_rank(n: int, rank: int, dropout_p: float) -> fl.LowRank:
    return fl.LowRank(leaf(rank, K), leaf(n, rank), 0.5, dropout_p)


def parameters(group: list[fl.Sibling]) -> list[Tensor]:
    return [t for s in group for t in (s.bias, *(s.lora[:2] if s.lora else ())) if t is not None]


def one_by_one(x: Tensor, group: list[fl.Sibling]) -> list[Tensor]:
    return [fl.linear(x, *sibling) for sibling in group]


def results(run: Callable[[], list[Tensor]], leaves: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    torch.manual_seed(3)
    y = run()
    generator = torch.Generator().manual_seed(4)
    dy = [torch.randn(part.shape, generator=generator).to(part.dtype) for part in y]
    return y, torch.autograd.grad(y, leaves, dy)


# float32's own, of sums in another order; 16-bit gradients of x are rounded once, not once a sibling
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 5, 40, 300])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_values_and_gradients_are_those_of_the_single_calls(dtype: torch.dtype, rows: int, dropout_p: float) -> None:
    x, group = leaf(rows, K, dtype=dtype), siblings(dropout_p)
    leaves = [x, *parameters(group)]
    y, (dx, *rest) = results(lambda: fl.linear_group(x, group), leaves)
    one_y, (one_dx, *one_rest) = results(lambda: one_by_one(x, group), leaves)
    for got, expected in zip([*y, *rest], [*one_y, *one_rest], strict=True):
        assert torch.equal(got, expected)
    torch.testing.assert_close(dx, one_dx, rtol=0, atol=TOLERANCE[dtype] * one_dx.abs().max().item())


def test_the_number_of_threads_changes_nothing(threads: Threads) -> None:
    x, group = leaf(70, K), siblings(0.25)
    leaves = [x, *parameters(group)]
    with threads(1):
        alone, gradients = results(lambda: fl.linear_group(x, group), leaves)
    with threads(2):
        both, others = results(lambda: fl.linear_group(x, group), leaves)
    assert all(torch.equal(a, b) for a, b in zip((*alone, *gradients), (*both, *others), strict=True))


def test_an_output_that_is_not_used_adds_nothing() -> None:
    x, group = leaf(6, K), siblings()
    dy = torch.randn(6, SIZES[0])
    y = fl.linear_group(x, group)[0]
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(fl.linear(x, *group[0]), x, dy)[0])


def test_leading_dimensions_are_kept_and_an_empty_batch_is_legal() -> None:
    group = siblings()
    assert [tuple(y.shape) for y in fl.linear_group(torch.randn(2, 3, K), group)] == [(2, 3, n) for n in SIZES]
    x = leaf(0, K)
    _, gradients = results(lambda: fl.linear_group(x, group), [x, *parameters(group)])
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_masks_again(use_reentrant: bool) -> None:
    x, group = leaf(9, K), siblings(0.5)
    torch.manual_seed(5)
    sum(y.sum() for y in fl.linear_group(x, group)).backward()  # type: ignore[union-attr]
    expected, x.grad = x.grad, None
    torch.manual_seed(5)
    again = checkpoint(lambda x: tuple(fl.linear_group(x, group)), x, use_reentrant=use_reentrant)
    sum(y.sum() for y in again).backward()
    assert expected is not None
    assert torch.equal(x.grad, expected)


def test_autocast_casts_x_as_it_does_for_one() -> None:
    x, group = torch.randn(5, K), siblings()
    with torch.autocast("cpu", torch.bfloat16):
        together, single = fl.linear_group(x, group), one_by_one(x, group)
    assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(together, single, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch reads it as it traces
def test_opcheck_finds_the_operators_clean() -> None:
    group = siblings()[::2]
    qts = [sibling.weight for sibling in group]
    parts = tuple([getattr(qt, name) for qt in qts] for name in ("codes", "absmax", "nested_absmax", "offset"))
    weights = (*parts, ["nf4"] * 2, [64] * 2, [qt.shape[0] for qt in qts], K)
    loras = [sibling.lora for sibling in group if sibling.lora]
    a, b = [lora.A for lora in loras], [lora.B for lora in loras]
    seeds = [torch.tensor(5), None]
    branches = (a, b, [0.5, 2.0], [0.1, 0.0], seeds)
    opcheck(torch.ops.ferrolora.linear_group.default, (leaf(7, K), *weights, [group[0].bias, None], *branches))
    dy = [torch.randn(7, qt.shape[0]) for qt in qts]
    s = [torch.randn(7, lora.A.shape[0]) for lora in loras]
    fixed = ([t.detach() for t in a], [t.detach() for t in b], *branches[2:])
    backward = torch.ops.ferrolora.linear_group_backward.default
    opcheck(backward, (dy, torch.randn(7, K), s, *weights, *fixed, [True, True, True]))
    opcheck(backward, (dy, None, s, *weights, *fixed, [True, False, False]))


def test_what_does_not_fit_is_refused_by_name() -> None:
    group = siblings()
    with pytest.raises(fl.ShapeError, match="at least one sibling"):
        fl.linear_group(torch.randn(2, K), [])
    with pytest.raises(fl.ShapeError, match="192, 64 columns"):
        fl.linear_group(torch.randn(2, K), [group[0], fl.Sibling(fl.quantize(torch.randn(8, 64)))])
    with pytest.raises(fl.ShapeError, match="sibling 1"):
        fl.linear_group(torch.randn(2, K), [group[0], fl.Sibling(fl.quantize(torch.randn(8)))])
    with pytest.raises(fl.ShapeError, match="linear_group"):
        fl.linear_group(torch.randn(2, K + 1), group)
    with pytest.raises(fl.UnsupportedError, match="meta"):
        fl.linear_group(torch.randn(2, K, device="meta"), group)


def test_a_second_derivative_is_refused() -> None:
    x, group = leaf(3, K), siblings()
    (dx,) = torch.autograd.grad(sum(y.sum() for y in fl.linear_group(x, group)), x, create_graph=True)
    with pytest.raises(fl.UnsupportedError, match="second derivatives"):
        dx.sum().backward()


def test_nothing_is_recorded_when_nothing_needs_a_gradient() -> None:
    group = [fl.Sibling(sibling.weight) for sibling in siblings()]
    assert all(y.grad_fn is None for y in fl.linear_group(torch.randn(3, K), group))
