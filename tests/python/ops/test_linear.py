"""Values and gradients of linear and linear + LoRA against float64 on the decoded weight."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import ferrolora as fl
from ferrolora import _native

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place
SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}  # subnormal
SHAPES = (  # M, N, K, r: K odd, below, at, above and not a multiple of the block; one row, few, many, ragged
    (1, 33, 65, 1),
    (1, 128, 256, 64),
    (7, 40, 64, 8),
    (7, 5, 1056, 16),
    (64, 48, 200, 16),
    (64, 96, 31, 1),
    (333, 70, 129, 64),
    (333, 31, 96, 8),
)


class Case(NamedTuple):
    """The inputs of y = x·Wᵀ + bias + s·(x⊙mask)·Aᵀ·Bᵀ and the gradient that comes in."""

    x: Tensor  # [M, K]
    w: Tensor  # [N, K]
    bias: Tensor  # [N]
    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    dy: Tensor  # [M, N]


class Results(NamedTuple):
    y: Tensor
    dx: Tensor
    dbias: Tensor
    da: Tensor
    db: Tensor


def float64_results(case: Case, scaling: float, mask: Tensor | None = None) -> Results:
    """Autograd in float64."""
    x, w, bias, a, b, dy = (tensor.detach().double() for tensor in case)
    leaves = [tensor.requires_grad_() for tensor in (x, bias, a, b)]
    dropped = x if mask is None else x * mask.double()
    y = x @ w.T + bias + scaling * (dropped @ a.T) @ b.T
    return Results(y.detach(), *torch.autograd.grad(y, leaves, dy))


def check(got: Results, case: Case, scaling: float, mask: Tensor | None = None) -> None:
    """Every element is within the error that float32 sums and one rounding to its type can make.

    A float32 sum of t products, in any order, errs by at most t·2⁻²⁴ of the sum of their magnitudes. The magnitudes
    are the same computation on absolute values. The longest chain of roundings to any result is one sum inside
    another inside a third, and 8 more roundings: decoding, mask, scaling, bias. S is also rounded to x's type, which
    reaches y and dB: that is the low-rank part's magnitude times x's unit. Where bfloat16 is multiplied directly, the
    low-rank part's float32 values are pairs of bfloat16, each off by 2⁻¹⁷ at most; a result depends on three of them.
    """
    exact = float64_results(case, scaling, mask)
    absolute = Case(*(tensor.detach().abs() for tensor in case))
    magnitude = float64_results(absolute, scaling, mask)
    without_base = absolute._replace(w=torch.zeros_like(case.w), bias=torch.zeros_like(case.bias))
    low_rank = float64_results(without_base, scaling, mask)
    m, k = case.x.shape
    n, r = case.b.shape
    terms = {"y": k + r, "dx": 2 * n + r, "dbias": m, "da": m + n, "db": m + k}
    for name in Results._fields:
        value, true = getattr(got, name), getattr(exact, name)
        bound = (terms[name] + 8) * UNIT[torch.float32] * getattr(magnitude, name)
        if multiplies_directly(case.x.dtype):
            bound = bound + 3.01 * 2.0**-17 * getattr(low_rank, name)
        if name in ("y", "db"):
            bound = bound + UNIT[case.x.dtype] * getattr(low_rank, name)
        bound = bound + UNIT[value.dtype] * true.abs() + SMALLEST[value.dtype]
        excess = (value.double() - true).abs() / bound
        assert float(excess.max()) <= 1.0, f"{name} exceeds its bound {float(excess.max()):.2f} times"


def multiplies_directly(dtype: torch.dtype) -> bool:
    """Whether the kernels multiply activations of this type with a weight rounded to it."""
    return dtype == torch.bfloat16 and _native.isa() == "amx"


def decoded(qt: fl.QuantTensor, dtype: torch.dtype) -> Tensor:
    """The weight that the kernels multiply activations of this type with, in float32."""
    return qt.dequantize(dtype if multiplies_directly(dtype) else torch.float32).float()


def make_case(shape: tuple[int, int, int, int], qt: fl.QuantTensor, dtype: torch.dtype, lora: torch.dtype) -> Case:
    m, n, k, r = shape
    x = torch.randn(m, k).to(dtype).requires_grad_()
    bias = torch.randn(n).to(lora).requires_grad_()
    a = torch.randn(r, k).to(lora).requires_grad_()
    b = torch.randn(n, r).to(lora).requires_grad_()
    return Case(x, decoded(qt, dtype), bias, a, b, torch.randn(m, n).to(dtype))


def run(case: Case, qt: fl.QuantTensor, scaling: float) -> Results:
    y = fl.linear(case.x, qt, case.bias, fl.LowRank(case.a, case.b, scaling))
    grads = torch.autograd.grad(y, (case.x, case.bias, case.a, case.b), case.dy)
    return Results(y.detach(), *grads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_values_and_gradients_are_as_exact_as_the_type_allows(
    quant_type: str, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    qt = fl.quantize(torch.randn(*shape[1:3]), fl.QuantSpec(quant_type))
    case = make_case(shape, qt, dtype, dtype)
    check(run(case, qt, 1.7), case, 1.7)


@pytest.mark.parametrize("rows", [1, 7, 64, 333])
@pytest.mark.parametrize("rank", [1, 8, 16, 64])
def test_every_rank_goes_with_every_number_of_rows(rank: int, rows: int) -> None:
    qt = fl.quantize(torch.randn(47, 161), fl.QuantSpec(block_size=128, double_quant=False))
    case = make_case((rows, 47, 161, rank), qt, torch.float32, torch.float32)
    check(run(case, qt, 0.5), case, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_in_float32_go_with_activations_in_16_bits(dtype: torch.dtype) -> None:
    qt = fl.quantize(torch.randn(40, 200))
    case = make_case((9, 40, 200, 8), qt, dtype, torch.float32)
    got = run(case, qt, 2.0)
    assert (got.y.dtype, got.dx.dtype, got.da.dtype, got.db.dtype) == (dtype, dtype, torch.float32, torch.float32)
    check(got, case, 2.0)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", UNIT)
def test_without_adapter_the_product_and_its_gradient_are_as_exact(dtype: torch.dtype, quant_type: str) -> None:
    for shape in SHAPES:
        qt = fl.quantize(torch.randn(*shape[1:3]), fl.QuantSpec(quant_type))
        case = make_case(shape, qt, dtype, dtype)
        case = case._replace(a=torch.zeros_like(case.a), b=torch.zeros_like(case.b))
        y = fl.linear(case.x, qt, case.bias)
        dx, dbias = torch.autograd.grad(y, (case.x, case.bias), case.dy)
        check(Results(y.detach(), dx, dbias, torch.zeros_like(case.a), torch.zeros_like(case.b)), case, 0.0)


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("rows", [1, 64])
def test_dropout_has_the_gradients_of_the_mask_that_its_seed_draws(dtype: torch.dtype, rows: int) -> None:
    qt = fl.quantize(torch.randn(48, 200))
    case = make_case((rows, 48, 200, 16), qt, dtype, dtype)
    seed, mask = torch.tensor(2**62 + 7), torch.empty(rows, 200)
    _native.dropout_mask(int(seed), rows, 200, 0.25, mask)
    weight = (qt.codes, qt.absmax, qt.nested_absmax, qt.offset, *qt.codec, 48, 200)
    y, _ = torch.ops.ferrolora.linear_lora(case.x, *weight, case.bias, case.a, case.b, 2.0, 0.25, seed)
    grads = torch.autograd.grad(y, (case.x, case.bias, case.a, case.b), case.dy)
    check(Results(y.detach(), *grads), case, 2.0, mask)


def test_the_dropout_mask_keeps_its_share_and_its_mean() -> None:
    mask = torch.empty(200, 500)
    _native.dropout_mask(3, 200, 500, 0.3, mask)
    assert mask.unique().tolist() == [0.0, torch.tensor(1 / 0.7).item()]
    # 100,000 draws with p = 0.3: the share's standard deviation is 0.00145; five of them.
    assert abs(float((mask == 0).float().mean()) - 0.3) < 5 * 0.00145


def test_dropout_follows_the_generator_of_torch() -> None:
    qt = fl.quantize(torch.randn(8, 64))
    x, lora = torch.randn(3, 64), fl.LowRank(torch.randn(4, 64), torch.randn(8, 4), 1.0, 0.5)
    torch.manual_seed(1)
    first, second = fl.linear(x, qt, lora=lora), fl.linear(x, qt, lora=lora)
    torch.manual_seed(1)
    assert torch.equal(fl.linear(x, qt, lora=lora), first)
    assert not torch.equal(first, second)


def test_leading_dimensions_are_kept() -> None:
    qt = fl.quantize(torch.randn(5, 64))
    x = torch.randn(2, 3, 4, 64)
    lora = fl.LowRank(torch.randn(2, 64), torch.randn(5, 2), 1.0)
    flat = fl.linear(x.view(-1, 64), qt, lora=lora)
    assert torch.equal(fl.linear(x, qt, lora=lora), flat.view(2, 3, 4, 5))
    assert fl.linear(x[0, 0, 0], qt).shape == (5,)


def test_rows_do_not_depend_on_their_neighbours_position_in_memory() -> None:
    qt = fl.quantize(torch.randn(24, 100))
    x = torch.randn(100, 14)
    assert torch.equal(fl.linear(x.T, qt), fl.linear(x.T.contiguous(), qt))
    wide = torch.randn(14, 300)
    assert torch.equal(fl.linear(wide[:, 50:150], qt), fl.linear(wide[:, 50:150].contiguous(), qt))


def test_not_a_number_and_infinity_pass_through() -> None:
    qt = fl.quantize(torch.randn(24, 100))
    x = torch.zeros(3, 100)
    x[0, 1], x[1, 1] = torch.nan, torch.inf
    y = fl.linear(x, qt)
    assert bool(y[0].isnan().all())
    assert not bool(y[1].isfinite().any())
    assert torch.equal(y[2], torch.zeros(24))


@pytest.mark.parametrize(
    ("x", "bias", "lora", "message"),
    [
        ((2, 63), None, None, r"linear: x must be \[\.\.\., 64\] for a weight \[8, 64\], not \[2, 63\]"),
        ((), None, None, r"x must be \[\.\.\., 64\]"),
        ((2, 64), (7,), None, r"bias must be \[8\], not \[7\]"),
        ((2, 64), None, ((4, 63), (8, 4)), r"A must be \[r, 64\] and B \[8, r\] .* not \[4, 63\] and \[8, 4\]"),
        ((2, 64), None, ((4, 64), (8, 5)), r"not \[4, 64\] and \[8, 5\]"),
        ((2, 64), None, ((0, 64), (8, 0)), r"with r of at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    x: tuple[int, ...],
    bias: tuple[int, ...] | None,
    lora: tuple[tuple[int, ...], tuple[int, ...]] | None,
    message: str,
) -> None:
    qt = fl.quantize(torch.randn(8, 64))
    low_rank = None if lora is None else fl.LowRank(torch.randn(lora[0]), torch.randn(lora[1]), 1.0)
    with pytest.raises(fl.ShapeError, match=message):
        fl.linear(torch.randn(x), qt, None if bias is None else torch.randn(bias), low_rank)


def test_a_weight_that_is_not_a_matrix_is_refused() -> None:
    with pytest.raises(fl.ShapeError, match=r"the weight must be \[N, K\], not \[64\]"):
        fl.linear(torch.randn(2, 64), fl.quantize(torch.randn(64)))


def test_types_without_a_kernel_are_refused() -> None:
    qt = fl.quantize(torch.randn(8, 64))
    x = torch.randn(2, 64)
    with pytest.raises(fl.UnsupportedError, match=r"x is torch\.float64; the kernels take float32"):
        fl.linear(x.double(), qt)
    with pytest.raises(fl.UnsupportedError, match="A and B must have one type"):
        fl.linear(x, qt, lora=fl.LowRank(torch.randn(4, 64), torch.randn(8, 4).half(), 1.0))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_dropout_outside_its_range_is_refused(p: float) -> None:
    qt = fl.quantize(torch.randn(8, 64))
    with pytest.raises(fl.UnsupportedError, match=f"dropout_p must be at least 0 and below 1, not {p}"):
        fl.linear(torch.randn(2, 64), qt, lora=fl.LowRank(torch.randn(4, 64), torch.randn(8, 4), 1.0, p))


def test_a_device_without_a_kernel_is_refused_with_the_whole_problem() -> None:
    qt = fl.quantize(torch.randn(8, 64))
    with pytest.raises(
        fl.UnsupportedError, match=r"linear: no kernel for the input on meta \(input \[2, 64\].*nf4.*64"
    ):
        fl.linear(torch.randn(2, 64, device="meta"), qt)
    with pytest.raises(fl.UnsupportedError, match="no kernel for the weight on meta"):
        fl.linear(torch.randn(2, 64), qt.to("meta"))


def test_products_of_torch_between_ours_are_untouched() -> None:
    """Both may configure the processor's matrix registers, on the same threads."""
    torch.manual_seed(0)
    qt = fl.quantize(torch.randn(256, 512))
    x, w = torch.randn(64, 512).bfloat16(), torch.randn(256, 512).bfloat16()
    theirs, ours = torch.nn.functional.linear(x, w), fl.linear(x, qt)
    for _ in range(20):
        assert torch.equal(torch.nn.functional.linear(x, w), theirs)
        assert torch.equal(fl.linear(x, qt), ours)
