from dataclasses import replace

import pytest
import torch

import ferrolora as fl
from ferrolora.spec import QUANT_TYPES


def test_nbytes_is_four_and_an_eighth_bits_a_parameter_with_double_quantization() -> None:
    qt = fl.quantize(torch.randn(256, 1024))
    # 4 bits, 8 bits a block of 64, 32 bits a nested block of 256 blocks, and the 4-byte offset.
    assert qt.nbytes == qt.numel() // 2 + qt.numel() // 64 + 4 * (qt.numel() // (64 * 256)) + 4


def test_to_keeps_values_and_scale_types() -> None:
    qt = fl.quantize(torch.randn(5, 33, dtype=torch.bfloat16))
    moved = qt.to("cpu")
    assert moved.absmax.dtype == torch.uint8
    assert torch.equal(moved.dequantize(), qt.dequantize())
    assert moved.device == torch.device("cpu")


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_dequantize_gives_back_the_original_type_and_shape_by_default(quant_type: str) -> None:
    qt = fl.quantize(torch.randn(3, 5, 7, dtype=torch.float16), fl.QuantSpec(quant_type))
    assert (qt.shape, qt.numel()) == ((3, 5, 7), 105)
    assert (qt.dequantize().dtype, qt.dequantize().shape) == (torch.float16, (3, 5, 7))
    assert qt.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["codes", "absmax", "nested_absmax", "offset"])
def test_a_part_of_the_wrong_length_is_refused_by_name(part: str) -> None:
    qt = fl.quantize(torch.randn(64, 64))
    longer = torch.zeros(qt.numel() * 2, dtype=getattr(qt, part).dtype)
    with pytest.raises(fl.ShapeError, match=rf"^{part} of a nf4 tensor of shape \(64, 64\).*must be .*not .*\[8192\]"):
        replace(qt, **{part: longer})


def test_a_missing_nested_scale_is_refused() -> None:
    qt = fl.quantize(torch.randn(64, 64))
    with pytest.raises(fl.ShapeError, match=r"nested_absmax .* must be torch.float32 \[1\], not None"):
        replace(qt, nested_absmax=None)


def test_float_scales_in_half_precision_are_refused() -> None:
    qt = fl.quantize(torch.randn(64, 64), fl.QuantSpec(double_quant=False))
    with pytest.raises(fl.ShapeError, match=r"absmax .* must be torch.float32 \[64\], not torch.float16"):
        replace(qt, absmax=qt.absmax.half())
