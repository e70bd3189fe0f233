"""What linear + LoRA saves, skips and refuses under autograd, checkpointing and autocast."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ferrolora as fl

M, N, K, R = 24, 40, 100, 8


class Problem(NamedTuple):
    x: Tensor
    qt: fl.QuantTensor
    bias: Tensor
    a: Tensor
    b: Tensor

    def run(self, dropout_p: float = 0.0) -> Tensor:
        return fl.linear(self.x, self.qt, self.bias, fl.LowRank(self.a, self.b, 1.5, dropout_p))

    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.bias, self.a, self.b


@pytest.fixture
def problem() -> Problem:
    shapes = ((M, K), (N,), (R, K), (N, R))
    x, bias, a, b = (torch.randn(shape, requires_grad=True) for shape in shapes)
    return Problem(x, fl.quantize(torch.randn(N, K)), bias, a, b)


def saved_bytes(run: Callable[[], Tensor], known: tuple[Tensor | None, ...]) -> int:
    """Bytes that autograd keeps for backward, beside tensors that live anyway."""
    kept = {tensor.data_ptr() for tensor in known if tensor is not None}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in kept:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_lora_saves_x_and_the_rank_r_product_only(problem: Problem, dtype: torch.dtype, dropout_p: float) -> None:
    # bfloat16 x is made inside, so it counts: x [M, K] and S [M, r], and a seed of 8 bytes with dropout.
    x = problem.x.detach().to(dtype).repeat(10, 1).requires_grad_()
    qt = problem.qt
    weights = (qt.codes, qt.absmax, qt.nested_absmax, qt.offset, problem.bias, problem.a, problem.b)
    ideal = 10 * M * (K + R) * dtype.itemsize
    saved = saved_bytes(lambda: problem._replace(x=x).run(dropout_p), weights)
    assert ideal <= saved <= 1.05 * ideal


def test_without_lora_nothing_is_saved(problem: Problem) -> None:
    qt = problem.qt
    weights = (qt.codes, qt.absmax, qt.nested_absmax, qt.offset, problem.bias)
    assert saved_bytes(lambda: fl.linear(problem.x, qt, problem.bias), weights) == 0


def test_frozen_adapters_save_nothing(problem: Problem) -> None:
    frozen = problem._replace(a=problem.a.detach(), b=problem.b.detach())
    qt = frozen.qt
    weights = (qt.codes, qt.absmax, qt.nested_absmax, qt.offset, frozen.bias, frozen.a, frozen.b)
    assert saved_bytes(frozen.run, weights) == 0


def test_nothing_is_recorded_when_nothing_needs_a_gradient(problem: Problem) -> None:
    detached = problem._replace(**{name: getattr(problem, name).detach() for name in ("x", "bias", "a", "b")})
    assert detached.run().grad_fn is None
    with torch.no_grad():
        assert problem.run().grad_fn is None
        assert torch.equal(problem.run(), detached.run())


@pytest.mark.parametrize("wanted", range(1, 16))
def test_any_subset_of_inputs_gets_the_same_gradients(problem: Problem, wanted: int) -> None:
    full = torch.autograd.grad(problem.run().square().sum(), problem.leaves())
    names = [name for i, name in enumerate(("x", "bias", "a", "b")) if wanted >> i & 1]
    frozen = {name: getattr(problem, name).detach() for name in ("x", "bias", "a", "b") if name not in names}
    some = torch.autograd.grad(
        problem._replace(**frozen).run().square().sum(), [getattr(problem, name) for name in names]
    )
    expected = [grad for i, grad in enumerate(full) if wanted >> i & 1]
    assert all(torch.equal(a, b) for a, b in zip(some, expected, strict=True))


def test_an_empty_batch_has_an_empty_output_and_zero_gradients(problem: Problem) -> None:
    empty = problem._replace(x=torch.randn(2, 0, K, requires_grad=True))
    y = empty.run()
    assert y.shape == (2, 0, N)
    dx, dbias, da, db = torch.autograd.grad(y.sum(), empty.leaves())
    assert dx.shape == (2, 0, K)
    assert not any(bool(grad.any()) for grad in (dbias, da, db))


def test_an_input_used_twice_gets_the_sum_of_both_gradients(problem: Problem) -> None:
    once = torch.autograd.grad(problem.run().sum(), problem.leaves())
    twice = torch.autograd.grad(problem.run().sum() + problem.run().sum(), problem.leaves())
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))


def test_an_expanded_or_transposed_output_gradient_is_understood(problem: Problem) -> None:
    for dy in (torch.randn(N, M).T, torch.tensor(0.5).expand(M, N)):
        got = torch.autograd.grad(problem.run(), problem.leaves(), dy)
        expected = torch.autograd.grad(problem.run(), problem.leaves(), dy.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_adapter_weights_of_any_strides_are_understood(problem: Problem) -> None:
    strided = problem._replace(
        a=problem.a.detach().T.contiguous().T.requires_grad_(), b=problem.b.detach().T.contiguous().T.requires_grad_()
    )
    got = torch.autograd.grad(strided.run().square().sum(), strided.leaves())
    expected = torch.autograd.grad(problem.run().square().sum(), problem.leaves())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_with_dropout(problem: Problem, use_reentrant: bool) -> None:
    def block(x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(problem._replace(x=x).run(dropout_p=0.3))

    torch.manual_seed(5)
    expected = torch.autograd.grad(block(problem.x).square().sum(), problem.leaves())
    torch.manual_seed(5)
    checkpoint(block, problem.x, use_reentrant=use_reentrant).square().sum().backward()
    for leaf, grad in zip(problem.leaves(), expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_second_derivative_is_refused(problem: Problem, with_lora: bool) -> None:
    y = problem.run() if with_lora else fl.linear(problem.x, problem.qt)
    (dx,) = torch.autograd.grad(y.square().sum(), problem.x, create_graph=True)
    with pytest.raises(fl.UnsupportedError, match="second derivatives are not implemented"):
        dx.square().sum().backward()


def test_a_change_of_x_between_forward_and_backward_is_noticed(problem: Problem) -> None:
    x = problem.x * 1.0
    y = problem._replace(x=x).run()
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_autocast_casts_x_as_it_does_for_a_float_layer(problem: Problem) -> None:
    weight = problem.qt.dequantize()
    with torch.autocast("cpu", torch.bfloat16):
        y = problem.run(dropout_p=0.5)
        assert y.dtype == torch.nn.functional.linear(problem.x, weight).dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert [leaf.grad.dtype for leaf in problem.leaves() if leaf.grad is not None] == [torch.float32] * 4
    expected = fl.linear(problem.x.bfloat16(), problem.qt)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fl.linear(problem.x, problem.qt), expected)
    with torch.autocast("cpu", enabled=False):
        assert fl.linear(problem.x, problem.qt).dtype == torch.float32
