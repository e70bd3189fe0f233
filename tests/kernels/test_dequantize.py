"""K0 gives the bits of the core's dequantize."""

import pytest
import torch
from torch import Tensor

from ferrolora import QuantSpec, QuantTensor, quantize
from kernels.emulator import Kernel, Out
from kernels.problem import TYPES, ceil_div, codec_constants, nan, parts, weight

# The last is a whole block of threads and a tail that ends within a byte.
SHAPES = [(1, 1), (3, 37), (70, 131), (64, 128), (9, 1001)]


def dequantize(qt: QuantTensor, type_name: str, transposed: bool = False) -> Tensor:
    n, k = qt.shape
    constants = {"FL_TYPE": type_name, **codec_constants(qt)}
    if transposed:
        out = nan(k, n, dtype=TYPES[type_name])
        kernel = Kernel("dequantize.cu", "dequantize_4bit_transposed", constants)
        kernel((ceil_div(k, 64), ceil_div(n, 64), 1), 256, *parts(qt), Out(out), n, k)
        return out.T
    out = nan(n, k, dtype=TYPES[type_name])
    kernel = Kernel("dequantize.cu", "dequantize_4bit", constants)
    kernel((ceil_div(n * k, 8192), 1, 1), 256, *parts(qt), Out(out), n * k)
    return out


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("type_name", TYPES)
def test_every_output_type_has_the_bits_of_the_core(type_name: str, transposed: bool, nested: bool) -> None:
    for shape in SHAPES:
        qt = weight(shape, nested=nested)
        assert torch.equal(dequantize(qt, type_name, transposed), qt.dequantize(TYPES[type_name])), shape


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_every_codec_and_block_size_has_the_bits_of_the_core(quant_type: str, block_size: int) -> None:
    for shape in SHAPES:
        qt = weight(shape, quant_type, block_size, nested=True)
        assert torch.equal(dequantize(qt, "bf16"), qt.dequantize(torch.bfloat16)), shape


def test_scales_beyond_one_nested_block_are_found() -> None:
    qt = weight((129, 512), block_size=32, nested=True)  # 2064 blocks, 9 nested ones
    assert torch.equal(dequantize(qt, "half"), qt.dequantize(torch.float16))


@pytest.mark.parametrize("type_name", TYPES)
def test_int8_has_the_bits_of_the_core(type_name: str) -> None:
    kernel = Kernel("dequantize.cu", "dequantize_int8", {"FL_TYPE": type_name})
    for rows, cols in [(1, 1), (3, 37), (70, 131), (5, 8), (40, 3)]:
        qt = quantize(torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)), QuantSpec("int8"))
        out = nan(rows, cols, dtype=TYPES[type_name])
        kernel((ceil_div(rows * cols, 8192), 1, 1), 256, qt.codes, qt.absmax, Out(out), rows, cols)
        assert torch.equal(out, qt.dequantize(TYPES[type_name])), (rows, cols)
