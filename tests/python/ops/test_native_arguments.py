"""The binding refuses arguments that its kernels could not read safely."""

import pytest
import torch

import ferrolora as fl


def test_out_that_shares_memory_with_the_scales_is_refused() -> None:
    qt = fl.quantize(torch.randn(1), fl.QuantSpec(double_quant=False))
    with pytest.raises(fl.UnsupportedError, match="out shares memory with absmax"):
        fl.dequantize(qt, out=qt.absmax)


def test_a_tensor_at_an_unaligned_address_is_refused() -> None:
    x = torch.frombuffer(bytearray(4 * 64 + 1), dtype=torch.float32, offset=1)
    with pytest.raises(fl.UnsupportedError, match=r"call \.clone\(\) first"):
        fl.quantize(x)
