"""The operators under torch.library.opcheck and torch.compile."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import ferrolora as fl

N, K, R = 33, 100, 4


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def problem(quant_type: str = "nf4", bias: bool = True) -> tuple[fl.QuantTensor, dict[str, Tensor]]:
    shapes = {"x": (7, K), "bias": (N,), "a": (R, K), "b": (N, R)}
    return fl.quantize(torch.randn(N, K), fl.QuantSpec(quant_type)), {
        name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()
    }


def weight_args(qt: fl.QuantTensor) -> tuple[Any, ...]:
    return qt.codes, qt.absmax, qt.nested_absmax, qt.offset, *qt.codec


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch reads it as it traces
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_opcheck_finds_the_linear_operators_clean(quant_type: str) -> None:
    ops = torch.ops.ferrolora
    qt, t = problem(quant_type)
    weight = (*weight_args(qt), N, K)
    seed, dy = torch.tensor(5), torch.randn(7, N)
    plain = {name: tensor.detach() for name, tensor in t.items()}
    opcheck(ops.linear.default, (t["x"], *weight, t["bias"]))
    opcheck(ops.linear_backward.default, (dy, *weight))
    opcheck(ops.linear_lora.default, (t["x"], *weight, t["bias"], t["a"], t["b"], 2.0, 0.1, seed))
    opcheck(ops.linear_lora.default, (t["x"], *weight, None, t["a"], t["b"], 2.0, 0.0, None))
    lora = (plain["a"], plain["b"], 2.0, 0.1, seed)
    s = torch.randn(7, R)
    opcheck(ops.linear_lora_backward.default, (dy, plain["x"], s, *weight, *lora, [True, True, True]))
    opcheck(ops.linear_lora_backward.default, (dy, None, None, *weight, *lora, [True, False, False]))


def test_opcheck_finds_the_codec_operators_clean() -> None:
    ops = torch.ops.ferrolora
    w = torch.randn(N, K)
    qt = fl.quantize(w)
    opcheck(ops.quantize_4bit.default, (w, "nf4", 64))
    opcheck(ops.double_quantize.default, (torch.rand(300),))
    opcheck(ops.dequantize_4bit.default, (*weight_args(qt), [N, K], torch.bfloat16))
    opcheck(ops.dequantize_4bit_out.default, (*weight_args(qt), torch.empty(N, K)))
    opcheck(ops.quantize_int8.default, (w,))
    rows = ops.quantize_int8(w)
    opcheck(ops.dequantize_int8.default, (*rows, torch.float16))
    opcheck(ops.dequantize_int8_out.default, (*rows, torch.empty(N, K)))
    opcheck(ops.quantize_blockwise.default, (w, 256))
    opcheck(ops.dequantize_blockwise.default, (*ops.quantize_blockwise(w, 256), 256, torch.float32))


def forward(x: Tensor, layer: fl.nn.QuantLinear, a: Tensor, b: Tensor, p: float) -> Tensor:
    return layer(x.relu()) + layer.forward_with_low_rank(x.relu(), fl.LowRank(a, b, 2.0, p))


def value_and_gradients(run: Callable[..., Tensor], layer: fl.nn.QuantLinear, t: dict[str, Tensor], p: float) -> Any:
    torch.manual_seed(3)
    y = run(t["x"], layer, t["a"], t["b"], p)
    return y, *torch.autograd.grad(y.square().sum(), (t["x"], layer.bias, t["a"], t["b"]))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_a_full_graph_gives_the_same_bits_forward_and_backward(quant_type: str, dropout_p: float) -> None:
    _, t = problem()
    layer = fl.nn.QuantLinear.from_linear(torch.nn.Linear(K, N), fl.QuantSpec(quant_type))
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    got = value_and_gradients(compiled, layer, t, dropout_p)
    expected = value_and_gradients(forward, layer, t, dropout_p)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_number_of_rows_may_change_without_a_new_graph_for_each() -> None:
    qt, t = problem()
    compiled = torch.compile(lambda x: fl.linear(x, qt, t["bias"]), backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.compiler.set_stance("default"):
        compiled(torch.randn(5, K))
        with torch.compiler.set_stance("fail_on_recompile"):
            for rows in (3, 8, 20):
                x = torch.randn(rows, K)
                assert torch.equal(compiled(x), fl.linear(x, qt, t["bias"]))


def test_layers_that_differ_in_their_scales_share_one_graph() -> None:
    layers = [fl.nn.QuantLinear.from_linear(torch.nn.Linear(K, K)) for _ in range(4)]
    compiled = torch.compile(lambda layer, x: layer(x), backend="aot_eager", fullgraph=True)
    x = torch.randn(3, K)
    compiled(layers[0], x)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert all(torch.equal(compiled(layer, x), layer(x)) for layer in layers)


def test_quantize_and_dequantize_trace_into_one_graph() -> None:
    def round_trip(w: Tensor) -> Tensor:
        return fl.quantize(w).dequantize(torch.bfloat16)

    w = torch.randn(N, K)
    assert torch.equal(torch.compile(round_trip, backend="aot_eager", fullgraph=True)(w), round_trip(w))


def test_fake_tensors_give_shapes_without_running_a_kernel() -> None:
    with FakeTensorMode():
        qt, t = problem()
        y = fl.linear(t["x"].bfloat16(), qt, t["bias"], fl.LowRank(t["a"], t["b"], 1.0, 0.5))
        assert (y.shape, y.dtype) == ((7, N), torch.bfloat16)
        assert qt.dequantize(torch.float16).shape == (N, K)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own; what it computes is the point
def test_inductor_gives_the_same_values_and_gradients() -> None:
    _, t = problem()
    layer = fl.nn.QuantLinear.from_linear(torch.nn.Linear(K, N))
    compiled = torch.compile(forward, backend="inductor", fullgraph=True)
    got = value_and_gradients(compiled, layer, t, 0.0)
    expected = value_and_gradients(forward, layer, t, 0.0)
    for a, b in zip(got, expected, strict=True):
        # The kernels are the same; inductor sums the bias gradient's 7 rows and the two branches in its own order.
        assert bool(((a - b).abs() <= 16 * 2.0**-24 * b.abs().max()).all())
