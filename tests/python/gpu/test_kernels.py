"""Every row of the kernel table on the GPU: codecs against the CPU's bytes, products against their formulas."""

from typing import Any

import pytest
import torch
from torch import Tensor

import ferrolora as fl
from ferrolora import _native
from ferrolora.cuda import launch as launcher
from ferrolora.cuda.launch import prepare, problem, ready
from ferrolora.ops import linear_cuda, quantize_blockwise, reference
from tiny.products import assert_close, parts, weight

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
CODECS = [("nf4", 64), ("nf4", 32), ("fp4", 64), ("nf4", 4096)]
# One row a kernel of the table: what it is forced on, and the shape. m, n, k, rank.
PRODUCTS = [
    ("gemv_4bit", 1, 4096, 4096, 0),
    ("gemv_4bit", 8, 1000, 1024, 16),
    ("gemm_4bit", 17, 1000, 1024, 16),
    ("gemm_4bit", 300, 520, 2048, 64),
    ("fma_forward", 5, 333, 1001, 3),
    ("library", 300, 520, 1000, 8),
]


def on_gpu(qt: fl.QuantTensor) -> tuple[Any, ...]:
    return parts(qt.to("cuda"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("quant_type", "block_size"), CODECS)
def test_codecs_give_the_bytes_of_the_cpu(quant_type: str, block_size: int, dtype: torch.dtype) -> None:
    w = torch.randn(129, 1031).to(dtype)
    spec = fl.QuantSpec(quant_type, block_size)
    right, got = fl.quantize(w, spec), fl.quantize(w.cuda(), spec)
    for name in ("codes", "absmax", "nested_absmax", "offset"):
        assert torch.equal(getattr(got, name).cpu(), getattr(right, name)), name
    for out in FLOATS:
        assert torch.equal(got.dequantize(out).cpu(), right.dequantize(out))


@pytest.mark.parametrize("dtype", FLOATS)
def test_8_bit_codecs_give_the_bytes_of_the_cpu(dtype: torch.dtype) -> None:
    w = torch.randn(67, 1031).to(dtype)
    right, got = fl.quantize(w, fl.QuantSpec("int8")), fl.quantize(w.cuda(), fl.QuantSpec("int8"))
    assert torch.equal(got.codes.cpu(), right.codes)
    assert torch.equal(got.absmax.cpu(), right.absmax)
    for out in FLOATS:
        assert torch.equal(got.dequantize(out).cpu(), right.dequantize(out))
    codes, absmax = quantize_blockwise.quantize_blockwise(w.cuda(), 256)
    right_codes, right_absmax = quantize_blockwise.quantize_blockwise(w, 256)
    assert torch.equal(codes.cpu(), right_codes)
    assert torch.equal(absmax.cpu(), right_absmax)
    back = quantize_blockwise.dequantize_blockwise(codes, absmax, 256, dtype)
    assert torch.equal(back.cpu(), quantize_blockwise.dequantize_blockwise(right_codes, right_absmax, 256, dtype))


def test_a_weight_is_decoded_transposed() -> None:
    qt = weight(130, 200).to("cuda")
    plan = prepare(0, "dequantize_transposed", torch.float16, 130, 200, nested=True)
    assert plan is not None
    out = torch.empty(200, 130, device="cuda", dtype=torch.float16)
    given = {"codes": qt.codes, "absmax": qt.absmax, "nested": qt.nested_absmax, "offset": qt.offset, "out": out}
    launcher.run(plan, 0, given)
    assert torch.equal(out.t(), qt.dequantize(torch.float16))


def test_a_weight_that_is_not_finite_is_refused() -> None:
    w = torch.randn(64, 64, device="cuda")
    w[3, 5] = torch.inf
    for spec in (fl.QuantSpec(), fl.QuantSpec("int8")):
        with pytest.raises(fl.QuantizationError, match=r"holds 1 NaN or infinite .* flat index 197"):
            fl.quantize(w, spec)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`forced(entry)` makes `linear` and `linear_backward` use that kernel, or its twin for the gradient."""

    def start(entry: str) -> None:
        backward = {"gemv_4bit": None, "gemm_4bit": "gemm_4bit_backward", "fma_forward": "fma_backward"}

        def prepared(index: int, op: str, *args: Any, **kwargs: Any) -> Any:
            if op == "linear":
                kwargs["kernel"] = entry
            elif op == "linear_backward":
                kwargs["kernel"] = backward.get(entry, entry)
            return prepare(index, op, *args, **kwargs)

        monkeypatch.setattr(linear_cuda, "prepare", prepared)

    return start


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("quant_type", "block_size"), CODECS[:3])
@pytest.mark.parametrize(("entry", "m", "n", "k", "rank"), PRODUCTS)
def test_products_and_their_gradients_are_their_formulas(
    forced: Any,
    entry: str,
    m: int,
    n: int,
    k: int,
    rank: int,
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
    dropout_p: float,
) -> None:
    if dtype == torch.bfloat16 and entry.startswith("gem") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bfloat16 tensor core")
    forced(entry)
    qt, x = weight(n, k, quant_type, block_size), torch.randn(m, k).to(dtype)
    w, dy, bias = qt.dequantize(torch.float32), torch.randn(m, n).to(dtype), torch.randn(n)
    if rank == 0:
        x_gpu = x.cuda().requires_grad_()
        y = fl.linear(x_gpu, qt.to("cuda"), bias.cuda())
        y.backward(dy.cuda())
        assert_close(y.detach().cpu(), reference.linear, x, w, bias, depth=k, rounded=dtype)
        assert x_gpu.grad is not None
        assert_close(x_gpu.grad.cpu(), reference.linear_backward, dy, w, depth=n, rounded=dtype)
        return
    check_branch(qt, x, dy, rank, dropout_p, dtype)


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_float32_and_odd_sizes_are_their_formulas(quant_type: str, rank: int) -> None:
    qt = weight(333, 1001, quant_type)
    for m in (3, 100):
        check_branch(qt, torch.randn(m, 1001), torch.randn(m, 333), rank, 0.25, torch.float32)


def check_branch(qt: fl.QuantTensor, x: Tensor, dy: Tensor, rank: int, dropout_p: float, dtype: torch.dtype) -> None:
    (n, k), m, w = qt.shape, x.shape[0], qt.dequantize(torch.float32)
    a, b, mask = torch.randn(rank, k), torch.randn(n, rank), torch.empty(m, k)
    _native.dropout_mask(7, m, k, dropout_p, mask)
    stored, lora = (*on_gpu(qt), n, k), (a.cuda(), b.cuda(), 0.5, dropout_p, torch.tensor(7, device="cuda"))
    y, s = torch.ops.ferrolora.linear_lora(x.cuda(), *stored, None, *lora)
    for i, out in enumerate((y, s)):
        formula = lambda x, w, a, b, mask: reference.linear_lora(x, w, None, a, b, 0.5, mask)[i]  # noqa: B023, E731
        assert_close(out.cpu(), formula, x, w, a, b, mask, depth=k, rounded=dtype)
    grads = torch.ops.ferrolora.linear_lora_backward(dy.cuda(), x.cuda(), s, *stored, *lora, [True] * 3)
    for i, (grad, depth) in enumerate(zip(grads, (n, m, m), strict=True)):
        formula = lambda dy, x, s, w, a, b, mask: (  # noqa: E731
            reference.linear_lora_backward(dy, x, s, w, a, b, 0.5, mask)[i]  # noqa: B023
        )
        assert_close(grad.cpu(), formula, dy, x, s.cpu(), w, a, b, mask, depth=depth + n, rounded=dtype)


def test_results_do_not_depend_on_when_blocks_run() -> None:
    qt, x = weight(1000, 4096).to("cuda"), torch.randn(3, 4096, device="cuda", dtype=torch.float16)
    first = fl.linear(x, qt)
    assert all(torch.equal(fl.linear(x, qt), first) for _ in range(20))


def test_the_suite_launches_every_row_of_the_table(launched: list[str], forced: Any) -> None:
    dtype = torch.float16
    for quant_type in ("nf4", "int8"):
        fl.quantize(torch.randn(64, 64, device="cuda"), fl.QuantSpec(quant_type)).dequantize(dtype)
    for entry, m, n, k, rank in PRODUCTS:
        forced(entry)
        check_branch(weight(n, k), torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), max(rank, 1), 0.1, dtype)
    check_branch(weight(40, 104), torch.randn(20, 104), torch.randn(20, 40), 4, 0.0, torch.float32)
    known = {row["entry"] for row in _native.cuda_kernels()} - {"dequantize_4bit_transposed"}  # has its own test
    assert known <= set(launched), sorted(known - set(launched))


def test_a_plan_of_this_device_is_that_of_its_description() -> None:
    row = _native.cuda_driver()["devices"][0]
    asked = problem("linear", dtype="float16", m=4, n=4096, k=4096)
    plan = _native.cuda_plan(asked, row["sm"], row["multiprocessors"])
    launch = _native.cuda_launch(asked, 0)
    assert plan is not None
    assert launch is not None
    assert (launch.entry, launch.constants) == (plan["entry"], plan["constants"])
    assert ready(torch.ones(8, device="cuda")).is_cuda
