"""Every operator's CUDA function, planned and emulated, against the CPU kernels."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ferrolora as fl
from ferrolora import _native
from ferrolora.cuda.mode import required_kernel
from ferrolora.ops import (
    double_quantize,
    int8,
    linear_base,
    linear_lora,
    quantize_4bit,
    quantize_blockwise,
    reference,
)
from tiny.products import assert_close, parts, weight

dequantize_4bit: Any = importlib.import_module("ferrolora.ops.dequantize_4bit")
linear_group: Any = importlib.import_module("ferrolora.ops.linear_group")

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
Emulate = Callable[..., Any]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantizing_gives_the_bytes_of_the_cpu(emulate: Emulate, quant_type: str, dtype: torch.dtype) -> None:
    emulate(90)
    x = torch.randn(37, 131, dtype=torch.float32).to(dtype)
    codes, absmax = quantize_4bit._cuda(x, quant_type, 64)
    expected = quantize_4bit._cpu(x, quant_type, 64)
    assert torch.equal(codes, expected[0])
    assert torch.equal(absmax, expected[1])
    for got, right in zip(double_quantize._cuda(absmax), double_quantize._cpu(absmax), strict=True):
        assert torch.equal(got, right)


def test_int8_quantizing_gives_the_bytes_of_the_cpu(emulate: Emulate) -> None:
    emulate(90)
    x = torch.randn(13, 131)
    for got, right in zip(int8._cuda_quantize(x), int8._cpu_quantize(x), strict=True):
        assert torch.equal(got, right)


def test_blockwise_8_bit_gives_the_bytes_of_the_cpu(emulate: Emulate) -> None:
    emulate(90)
    for x in (torch.randn(13, 131), torch.zeros(70), torch.randn(3, 5).half(), torch.empty(0)):
        got, right = quantize_blockwise._cuda_quantize(x, 64), quantize_blockwise._cpu_quantize(x, 64)
        assert torch.equal(got[0], right[0])
        assert torch.equal(got[1], right[1])
        for dtype in FLOATS:
            back = quantize_blockwise._cuda_dequantize(*got, 64, dtype)
            assert torch.equal(back, quantize_blockwise._cpu_dequantize(*right, 64, dtype))
    with pytest.raises(fl.UnsupportedError, match="block_size must be from 1 to 4096, got 5000"):
        quantize_blockwise._cuda_quantize(torch.zeros(3), 5000)
    with pytest.raises(fl.ShapeError, match="expected 2 elements for 70 codes in blocks of 64, got 1"):
        quantize_blockwise._cuda_dequantize(torch.zeros(70, dtype=torch.uint8), torch.ones(1), 64, torch.float32)


@pytest.mark.parametrize("quantize", [quantize_4bit._cuda, int8._cuda_quantize, quantize_blockwise._cuda_quantize])
def test_a_weight_that_is_not_finite_is_refused_as_on_the_cpu(emulate: Emulate, quantize: Any) -> None:
    emulate(90)
    x = torch.randn(9, 64)
    x[3, 5] = torch.nan
    x[4, 0] = torch.inf
    codec = {quantize_4bit._cuda: ("nf4", 64), quantize_blockwise._cuda_quantize: (64,)}.get(quantize, ())
    with pytest.raises(fl.QuantizationError, match=r"w holds 2 NaN or infinite .* flat index 197"):
        quantize(x, *codec, "w")


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantizing_gives_the_bits_of_the_cpu(emulate: Emulate, dtype: torch.dtype) -> None:
    emulate(90)
    for nested in (False, True):
        qt = weight(37, 131, nested=nested)
        assert torch.equal(dequantize_4bit._cuda(*parts(qt), list(qt.shape), dtype), qt.dequantize(dtype))
        out = torch.empty(131, 37, dtype=dtype).t()
        dequantize_4bit._cuda_out(*parts(qt), out)
        assert torch.equal(out, qt.dequantize(dtype))
    qt = weight(13, 131, "int8")
    assert torch.equal(int8._cuda_dequantize(qt.codes, qt.absmax, dtype), qt.dequantize(dtype))


# (architecture, crossover, type, rows, n, k, codec): one row for each way through the planner.
ROUTES = [
    pytest.param(90, None, torch.bfloat16, 1, 72, 128, "nf4", id="gemv: a byte by a table"),
    pytest.param(86, None, torch.float16, 8, 40, 256, "fp4", id="gemv: a byte by permutes"),
    pytest.param(80, None, torch.bfloat16, 20, 136, 128, "nf4", id="gemm: a pipeline of copies"),
    pytest.param(75, None, torch.float16, 40, 72, 192, "nf4", id="gemm: staged through registers"),
    pytest.param(90, 4, torch.float16, 20, 72, 128, "nf4", id="library: many rows"),
    pytest.param(75, None, torch.bfloat16, 3, 72, 128, "nf4", id="fma: no bfloat16 tensor core"),
    pytest.param(90, None, torch.float32, 5, 33, 100, "fp4", id="fma: float32, odd sizes"),
    pytest.param(90, None, torch.float16, 2, 40, 64, "int8", id="fma: int8"),
    pytest.param(90, None, torch.float32, 40, 33, 100, "nf4", id="library: float32, odd sizes"),
    pytest.param(90, None, torch.float16, 40, 40, 64, "int8", id="library: int8"),
]


SHAPE = ("sm", "fused_rows", "dtype", "m", "n", "k", "quant_type")


@pytest.mark.parametrize(SHAPE, ROUTES)
def test_a_linear_is_its_formula(
    emulate: Emulate, sm: int, fused_rows: int | None, dtype: torch.dtype, m: int, n: int, k: int, quant_type: str
) -> None:
    emulate(sm, fused_rows)
    qt, x, dy = weight(n, k, quant_type), torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    w, bias, problem = qt.dequantize(torch.float32), torch.randn(n), (*parts(qt), n, k)
    assert_close(linear_base._cuda(x, *problem, bias), reference.linear, x, w, bias, depth=k, rounded=dtype)
    assert_close(linear_base._cuda(x, *problem, None), reference.linear, x, w, depth=k, rounded=dtype)
    dx = linear_base._cuda_backward(dy, *problem)
    assert_close(dx, reference.linear_backward, dy, w, depth=n, rounded=dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(SHAPE, ROUTES)
def test_a_linear_with_a_branch_is_its_formula(
    emulate: Emulate,
    sm: int,
    fused_rows: int | None,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    quant_type: str,
    dropout_p: float,
) -> None:
    emulate(sm, fused_rows)
    qt, x, dy = weight(n, k, quant_type), torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    w, a, b, seed = qt.dequantize(torch.float32), torch.randn(4, k), torch.randn(n, 4), torch.tensor(7)
    mask = torch.empty(m, k)
    _native.dropout_mask(7, m, k, dropout_p, mask)
    problem, lora = (*parts(qt), n, k), (a, b, 0.5, dropout_p, seed)
    y, s = linear_lora._cuda(x, *problem, None, *lora)
    for i, out in enumerate((y, s)):
        formula = lambda x, w, a, b, mask: reference.linear_lora(x, w, None, a, b, 0.5, mask)[i]  # noqa: B023, E731
        assert_close(out, formula, x, w, a, b, mask, depth=k, rounded=dtype)
    grads = linear_lora._cuda_backward(dy, x, s, *problem, *lora, [True] * 3)
    for i, (grad, depth) in enumerate(zip(grads, (n, m, m), strict=True)):
        formula = lambda dy, x, s, w, a, b, mask: (  # noqa: E731
            reference.linear_lora_backward(dy, x, s, w, a, b, 0.5, mask)[i]  # noqa: B023
        )
        assert_close(grad, formula, dy, x, s, w, a, b, mask, depth=depth + n, rounded=dtype)


@pytest.mark.parametrize(SHAPE, ROUTES)
def test_rows_use_their_own_ranks(
    emulate: Emulate, sm: int, fused_rows: int | None, dtype: torch.dtype, m: int, n: int, k: int, quant_type: str
) -> None:
    emulate(sm, fused_rows)
    qt, x, dy = weight(n, k, quant_type), torch.randn(2 * m, k).to(dtype), torch.randn(2 * m, n).to(dtype)
    w, a, b = qt.dequantize(torch.float32), torch.randn(4, k), torch.randn(n, 4)
    problem, lora, row_ranks = (*parts(qt), n, k), (a, b, 0.5, 0.0, None), [1, 4, 0, 1]
    own = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0]]).repeat_interleave(m, 0)
    y, s = linear_lora._cuda(x, *problem, None, *lora, row_ranks)
    formula = lambda x, w, a, b, own: x @ w.T + 0.5 * ((x @ a.T) * own) @ b.T  # noqa: E731
    assert_close(y, formula, x, w, a, b, own, depth=k, rounded=dtype)
    assert bool((s[own == 0] == 0).all())
    dx, da, db = linear_lora._cuda_backward(dy, x, s, *problem, *lora, [True] * 3, row_ranks)
    ds = lambda dy, b, own: 0.5 * (dy @ b) * own  # noqa: E731
    input_gradient = lambda dy, w, a, b, own: dy @ w + ds(dy, b, own) @ a  # noqa: E731
    assert_close(dx, input_gradient, dy, w, a, b, own, depth=n, rounded=dtype)
    assert_close(da, lambda dy, x, b, own: ds(dy, b, own).T @ x, dy, x, b, own, depth=2 * m + n, rounded=dtype)
    assert_close(db, lambda dy, s: 0.5 * dy.T @ s, dy, s, depth=2 * m, rounded=dtype)


EXACT = [route for route in ROUTES if "library" not in str(route.id)]


@pytest.mark.parametrize(SHAPE, EXACT)
def test_exact_products_have_the_bits_of_a_decoded_weight(
    emulate: Emulate, sm: int, fused_rows: int | None, dtype: torch.dtype, m: int, n: int, k: int, quant_type: str
) -> None:
    machine = emulate(sm, fused_rows)
    qt, x, dy = weight(n, k, quant_type), torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    w, bias, problem = qt.dequantize(dtype), torch.randn(n), (*parts(qt), n, k)
    with fl.cuda.exact():
        assert torch.equal(linear_base._cuda(x, *problem, None), torch.mm(x, w.t()))
        assert torch.equal(linear_base._cuda(x, *problem, bias), torch.addmm(bias.to(dtype), x, w.t()))
        assert torch.equal(linear_base._cuda_backward(dy, *problem), torch.mm(dy, w))
    assert {entry.partition("_")[0] for entry in machine.launched} == {"dequantize"}
    machine.launched.clear()
    linear_base._cuda(x, *problem, None)
    assert not any(entry.startswith("dequantize") for entry in machine.launched)


def test_an_exact_product_with_a_branch_is_that_product_and_the_branch(emulate: Emulate) -> None:
    machine = emulate(90)
    qt, x, dy = weight(72, 128), torch.randn(3, 128).half(), torch.randn(3, 72).half()
    zero = (torch.randn(4, 128), torch.zeros(72, 4), 0.5, 0.0, None)
    with fl.cuda.exact():
        y, s = linear_lora._cuda(x, *parts(qt), 72, 128, None, *zero)
        dx, _, _ = linear_lora._cuda_backward(dy, x, s, *parts(qt), 72, 128, *zero, [True] * 3)
    w = qt.dequantize(torch.float16)
    assert torch.equal(y, torch.mm(x, w.t()))  # B = 0: the branch adds zeros
    assert torch.equal(dx, torch.mm(dy, w))
    assert not {"gemv_4bit", "gemm_4bit", "gemm_4bit_backward"} & set(machine.launched)


def test_an_exact_gradient_never_loses_its_mask(emulate: Emulate) -> None:
    emulate(90)
    qt, x, dy, s = weight(33, 100), torch.randn(5, 100), torch.randn(5, 33), torch.randn(5, 4)
    lora = (torch.randn(4, 100), torch.randn(33, 4), 0.5, 0.25, torch.tensor(7))
    with fl.cuda.exact(), pytest.raises(fl.UnsupportedError, match=r"dropout 0.25 to torch.float32"):
        linear_lora._cuda_backward(dy, x, s, *parts(qt), 33, 100, *lora, [True] * 3)


def test_exact_blocks_nest_and_end_with_an_error() -> None:
    def fail() -> None:
        with fl.cuda.exact(), fl.cuda.exact():
            assert required_kernel() == "library"
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert required_kernel() is None


def test_only_the_gradients_that_are_needed_are_computed(emulate: Emulate) -> None:
    machine = emulate(90)
    qt, x, dy = weight(33, 100), torch.randn(5, 100), torch.randn(5, 33)
    lora = (torch.randn(4, 100), torch.randn(33, 4), 0.5, 0.0, None)
    for needs, kernels in [
        ([True, False, False], ["fma_lora_ds", "fma_backward"]),
        ([False, True, False], ["fma_lora_ds", "fma_lora_da"]),
        ([False, False, True], ["fma_lora_ds", "fma_lora_db"]),
    ]:
        machine.launched.clear()
        s = torch.randn(5, 4) if needs[2] else None
        grads = linear_lora._cuda_backward(dy, x if needs[1] else None, s, *parts(qt), 33, 100, *lora, needs)
        assert machine.launched == kernels
        assert [grad.numel() > 0 for grad in grads] == needs


def test_a_group_is_its_linears_and_one_gradient(emulate: Emulate) -> None:
    emulate(90)
    x, sizes = torch.randn(5, 100), (33, 20)
    weights = [weight(n, 100) for n in sizes]
    columns = [list(column) for column in zip(*(parts(qt) for qt in weights), strict=True)]
    a, b = [torch.randn(4, 100), torch.empty(0, 100)], [torch.randn(33, 4), torch.empty(20, 0)]
    stored, branches, bias = (*columns, list(sizes), 100), (a, b, [0.5, 1.0], [0.0, 0.0], [None, None]), torch.randn(20)
    y, s = linear_group._cuda(x, *stored, [None, bias], *branches)
    lora = (a[0], b[0], 0.5, 0.0, None)
    alone, alone_s = linear_lora._cuda(x, *parts(weights[0]), 33, 100, None, *lora)
    assert torch.equal(y[0], alone)
    assert torch.equal(s[0], alone_s)
    assert torch.equal(y[1], linear_base._cuda(x, *parts(weights[1]), 20, 100, bias))
    dy = [torch.randn(5, n) for n in sizes]
    dx, da, db = linear_group._cuda_backward(dy, x, s, *stored, *branches, [True] * 3)
    one = linear_lora._cuda_backward(dy[0], x, s[0], *parts(weights[0]), 33, 100, *lora, [True] * 3)
    other = linear_base._cuda_backward(dy[1], *parts(weights[1]), 20, 100)
    assert torch.equal(dx, one[0] + other)
    assert torch.equal(da[0], one[1])
    assert torch.equal(db[0], one[2])


def test_no_rows_launch_nothing(emulate: Emulate) -> None:
    machine = emulate(90)
    qt = weight(64, 64)
    assert linear_base._cuda(torch.empty(0, 64), *parts(qt), 64, 64, None).shape == (0, 64)
    assert linear_base._cuda_backward(torch.empty(0, 64), *parts(qt), 64, 64).shape == (0, 64)
    lora = (torch.ones(2, 64), torch.ones(64, 2), 1.0, 0.0, None)
    empty, s = torch.empty(0, 64), torch.empty(0, 2)
    grads = linear_lora._cuda_backward(empty, empty, s, *parts(qt), 64, 64, *lora, [True] * 3)
    assert not grads[1].any()
    assert not grads[2].any()
    assert machine.launched == []
