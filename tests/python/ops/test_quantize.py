"""quantize and dequantize against the twin, bit for bit, and what they refuse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ferrolora as fl
from ferrolora.ops import reference
from ferrolora.ops.quantize_blockwise import dequantize_blockwise, quantize_blockwise
from ferrolora.spec import BLOCK_SIZES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 2, 31, 63, 64, 65, 1000, 4097)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells 0.0 from -0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and a.view(torch.uint8).equal(b.view(torch.uint8))


def check_4bit(w: Tensor, spec: fl.QuantSpec) -> None:
    """Codes, scales and all three decodings of w equal the twin's."""
    qt = fl.quantize(w, spec)
    codes, absmax = reference.quantize_4bit(w, spec.quant_type, spec.block_size)
    nested, offset = None, 0.0
    if spec.double_quant:
        absmax, nested, offset = reference.double_quantize(absmax)
        assert qt.nested_absmax is not None
        assert qt.offset is not None
        assert same_bits(qt.nested_absmax, nested)
        assert float(qt.offset) == offset
    assert same_bits(qt.codes, codes)
    assert same_bits(qt.absmax, absmax)
    for dtype in DTYPES:
        decoded = reference.dequantize_4bit(codes, absmax, nested, offset, *qt.codec, tuple(w.shape), dtype)
        assert same_bits(qt.dequantize(dtype), decoded)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_equals_the_twin(quant_type: str, block_size: int, dtype: torch.dtype, double_quant: bool) -> None:
    for size in SIZES:
        check_4bit(torch.randn(size).to(dtype), fl.QuantSpec(quant_type, block_size, double_quant))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-39, 1e-30, 1.0, 1e30, 3e38])
def test_4bit_equals_the_twin_from_subnormal_to_huge(quant_type: str, scale: float) -> None:
    check_4bit(torch.empty(300).uniform_(-1, 1) * scale, fl.QuantSpec(quant_type, double_quant=False))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_values_on_a_threshold_take_the_lower_code(quant_type: str) -> None:
    table = reference.codebook(quant_type).sort().values
    ties = torch.cat([torch.ones(1), (table[:-1] + table[1:]) / 2, table])  # absmax 1: scaled values are these
    check_4bit(ties, fl.QuantSpec(quant_type, double_quant=False))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(finite, min_size=1, max_size=200),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from([32, 64, 128]),
    double_quant=st.booleans(),
)
def test_4bit_equals_the_twin_on_any_finite_values(
    values: list[float], quant_type: str, block_size: int, double_quant: bool
) -> None:
    check_4bit(torch.tensor(values), fl.QuantSpec(quant_type, block_size, double_quant))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(finite, min_size=1, max_size=200), block_size=st.sampled_from([32, 64, 128]))
def test_nf4_error_is_at_most_half_the_widest_gap(values: list[float], block_size: int) -> None:
    w = torch.tensor(values)
    qt = fl.quantize(w, fl.QuantSpec("nf4", block_size, double_quant=False))
    absmax = qt.absmax.repeat_interleave(block_size)[: w.numel()]
    # The widest gap is 1 - 0.6962 = 0.3039, below -0.6962; three float32 roundings of at most 2^-24 of absmax each.
    # Below 1e-38 the reciprocal is clamped, and a value may decode to anything up to its absmax.
    bound = absmax * (0.3039 / 2 + 3 * 2.0**-24) + torch.where(absmax < 1e-38, absmax, 0.0)
    assert bool(((w - qt.dequantize()).abs() <= bound).all())


def test_a_zero_block_is_zero_scale_and_the_code_of_zero() -> None:
    nf4, fp4 = (fl.quantize(torch.zeros(64), fl.QuantSpec(kind, double_quant=False)) for kind in ("nf4", "fp4"))
    assert nf4.codes.unique().tolist() == [0x77]
    assert fp4.codes.unique().tolist() == [0x00]
    assert float(nf4.absmax) == float(fp4.absmax) == 0.0


def test_an_odd_count_is_padded_with_the_code_of_zero() -> None:
    assert int(fl.quantize(torch.ones(1)).codes) == 0xF7
    assert int(fl.quantize(torch.ones(1), fl.QuantSpec("fp4")).codes) == 0x30


def test_the_high_nibble_is_the_first_element() -> None:
    assert fl.quantize(torch.tensor([1.0, -1.0])).codes.tolist() == [[0xF0]]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_strides_do_not_matter(quant_type: str) -> None:
    w = torch.randn(40, 70)
    spec = fl.QuantSpec(quant_type)
    for view in (w.T, w[:, ::2], w[3:, 5:], w.expand(2, 40, 70)):
        a, b = fl.quantize(view, spec), fl.quantize(view.contiguous(), spec)
        assert same_bits(a.codes, b.codes)
        assert same_bits(a.absmax, b.absmax)
        assert a.shape == view.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_equals_the_twin(dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (3, 5), (7, 64), (33, 129)):
        w = torch.randn(rows, columns).to(dtype)
        w[0] = 0.0
        qt = fl.quantize(w, fl.QuantSpec("int8"))
        codes, scb = reference.quantize_int8(w)
        assert same_bits(qt.codes, codes)
        assert same_bits(qt.absmax, scb)
        for out in DTYPES:
            assert same_bits(qt.dequantize(out), reference.dequantize_int8(codes, scb, out))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-36, 3e38])
def test_int8_equals_the_twin_from_subnormal_to_huge(scale: float) -> None:
    w = torch.empty(4, 50).uniform_(-1, 1) * scale
    assert same_bits(fl.quantize(w, fl.QuantSpec("int8")).codes, reference.quantize_int8(w)[0])


def test_int8_rows_are_the_last_dimension() -> None:
    w = torch.randn(2, 3, 5)
    qt = fl.quantize(w, fl.QuantSpec("int8"))
    assert qt.codes.shape == (6, 5)
    assert qt.dequantize().shape == w.shape
    assert fl.quantize(torch.tensor(3.0), fl.QuantSpec("int8")).dequantize().item() == pytest.approx(3.0, rel=2**-22)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_blockwise_8bit_equals_the_twin(block_size: int, dtype: torch.dtype) -> None:
    for size in SIZES:
        x = torch.randn(size).to(dtype)
        codes, absmax = quantize_blockwise(x, block_size)
        twin_codes, twin_absmax = reference.quantize_blockwise(x, block_size)
        assert same_bits(codes, twin_codes)
        assert same_bits(absmax, twin_absmax)
        decoded = dequantize_blockwise(codes, absmax, block_size, dtype)
        assert same_bits(decoded, reference.dequantize_blockwise(codes, absmax, block_size, dtype))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(finite, min_size=1, max_size=600))
def test_double_quantization_equals_the_twin_on_any_scales(values: list[float]) -> None:
    absmax = torch.tensor(values).abs()
    codes, nested, offset = torch.ops.ferrolora.double_quantize(absmax)
    twin_codes, twin_nested, twin_offset = reference.double_quantize(absmax)
    assert same_bits(codes, twin_codes)
    assert same_bits(nested, twin_nested)
    # The exact mean lies between two float32 values; a float64 sum of n terms may put it on either side of a tie.
    exact = math.fsum(absmax.tolist()) / len(values)
    assert float(offset) == twin_offset == float(torch.tensor(exact, dtype=torch.float32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spec", [fl.QuantSpec(), fl.QuantSpec("fp4", double_quant=False), fl.QuantSpec("int8")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_refused_by_name_count_and_place(
    spec: fl.QuantSpec, bad: float, dtype: torch.dtype
) -> None:
    w = torch.randn(20, 100).to(dtype)
    w[3, 41] = w[19, 99] = bad
    with pytest.raises(fl.QuantizationError, match=r"layers\.0\.q_proj.*\b2\b.*\b341\b"):
        fl.quantize(w, spec, name="layers.0.q_proj")


def test_blockwise_refuses_values_that_are_not_finite() -> None:
    x = torch.zeros(300)
    x[299] = math.nan
    with pytest.raises(fl.QuantizationError, match=r"\b299\b"):
        quantize_blockwise(x, 64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64, torch.bool])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(fl.UnsupportedError, match=str(dtype)):
        fl.quantize(torch.ones(64, dtype=dtype))


def test_an_empty_tensor_is_refused() -> None:
    with pytest.raises(fl.ShapeError, match=r"\[0, 64\] holds no values"):
        fl.quantize(torch.empty(0, 64))


def test_a_device_without_a_kernel_is_refused_with_the_whole_problem() -> None:
    with pytest.raises(fl.UnsupportedError, match=r"quantize: no kernel .* meta .*\[4, 64\] torch.bfloat16.* nf4.* 64"):
        fl.quantize(torch.empty(4, 64, device="meta", dtype=torch.bfloat16))


def test_a_weight_that_needs_a_gradient_is_quantized_without_one() -> None:
    qt = fl.quantize(torch.nn.Parameter(torch.randn(4, 64)))
    assert not qt.dequantize().requires_grad


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_fills_a_given_tensor_of_any_strides(quant_type: str, dtype: torch.dtype) -> None:
    qt = fl.quantize(torch.randn(33, 65), fl.QuantSpec(quant_type))
    expected = qt.dequantize(dtype)
    for out in (torch.empty(33, 65, dtype=dtype), torch.empty(65, 33, dtype=dtype).T):
        assert fl.dequantize(qt, out=out) is out
        assert torch.equal(out, expected)


def test_dequantize_refuses_a_tensor_that_does_not_fit() -> None:
    qt = fl.quantize(torch.randn(8, 64))
    with pytest.raises(fl.ShapeError, match=r"out must be \[8, 64\] any float type, not \[64, 8\]"):
        fl.dequantize(qt, out=torch.empty(64, 8))
    with pytest.raises(fl.ShapeError, match=r"torch.float16, not \[8, 64\] torch.float32"):
        fl.dequantize(qt, torch.float16, out=torch.empty(8, 64))
    with pytest.raises(fl.UnsupportedError, match="float64"):
        fl.dequantize(qt, torch.float64)
