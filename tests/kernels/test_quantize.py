"""K1 gives the bytes of the core's quantize."""

import pytest
import torch
from torch import Tensor

from ferrolora import QuantSpec, quantize
from kernels.emulator import Kernel, Out
from kernels.problem import TYPES, ceil_div

NUMELS = [1, 63, 64, 2048, 5001]


def values(numel: int, type_name: str) -> Tensor:
    """Normal values with a block of zeros, a tiny block and values on thresholds."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    x[64:128] = 0.0
    x[128:192] *= 1e-39 if type_name == "float" else 1e-6
    x[192:256] = torch.linspace(-1, 1, 64)[: max(0, numel - 192)]
    return x.to(TYPES[type_name])


def quantize_4bit(x: Tensor, type_name: str, quant_type: str, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, absmax, and the flag for what is not finite."""
    constants = {"FL_TYPE": type_name, "FL_CODEC": quant_type, "FL_BLOCK_SIZE": block_size}
    kernel = Kernel("quantize.cu", "quantize_4bit", constants)
    numel = x.numel()
    codes = torch.full((ceil_div(numel, 2), 1), 0xEE, dtype=torch.uint8)
    absmax = torch.full((ceil_div(numel, block_size),), torch.nan)
    nonfinite = torch.zeros(1, dtype=torch.int32)
    grid = (ceil_div(numel, max(2048, 8 * block_size)), 1, 1)
    kernel(grid, 256, x, Out(codes), Out(absmax), Out(nonfinite), numel)
    return codes, absmax, nonfinite


def assert_bytes_of_the_core(type_name: str, quant_type: str, block_size: int) -> None:
    for numel in NUMELS:
        x = values(numel, type_name)
        codes, absmax, nonfinite = quantize_4bit(x, type_name, quant_type, block_size)
        expected = quantize(x, QuantSpec(quant_type, block_size, double_quant=False))
        assert torch.equal(codes, expected.codes), numel
        assert torch.equal(absmax, expected.absmax), numel
        assert nonfinite.item() == 0


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_input_type_gives_the_bytes_of_the_core(quant_type: str, type_name: str) -> None:
    assert_bytes_of_the_core(type_name, quant_type, 64)


@pytest.mark.parametrize("block_size", [32, 128, 256, 512, 4096])
def test_every_block_size_gives_the_bytes_of_the_core(block_size: int) -> None:
    assert_bytes_of_the_core("half", "nf4", block_size)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_raises_the_flag(bad: float) -> None:
    x = values(5001, "float")
    x[4999] = bad
    assert quantize_4bit(x, "float", "nf4", 64)[2].item() == 1


@pytest.mark.parametrize("blocks", [1, 255, 256, 3000])
def test_double_quantization_gives_the_bytes_of_the_core(blocks: int) -> None:
    x = torch.randn(blocks * 64, generator=torch.Generator().manual_seed(2)) * torch.rand(blocks).repeat_interleave(64)
    expected = quantize(x, QuantSpec("nf4", 64, double_quant=True))
    absmax = quantize(x, QuantSpec("nf4", 64, double_quant=False)).absmax
    offset = torch.full((), torch.nan)
    constants = {"FL_TYPE": "float"}
    Kernel("quantize.cu", "absmax_mean", constants)((1, 1, 1), 1024, absmax, Out(offset), blocks)
    codes = torch.full((blocks,), 0xEE, dtype=torch.uint8)
    nested = torch.full((ceil_div(blocks, 256),), torch.nan)
    kernel = Kernel("quantize.cu", "quantize_absmax", constants)
    kernel((ceil_div(blocks, 2048), 1, 1), 256, absmax, offset, Out(codes), Out(nested), blocks)
    # Sums of float64 in another order differ by 2^-53 of their size at most a few times: the float32 mean is the same.
    assert torch.equal(offset, expected.offset)
    assert torch.equal(codes, expected.absmax)
    assert torch.equal(nested, expected.nested_absmax)


@pytest.mark.parametrize("type_name", TYPES)
def test_int8_gives_the_bytes_of_the_core(type_name: str) -> None:
    kernel = Kernel("quantize.cu", "quantize_int8", {"FL_TYPE": type_name})
    for rows, cols in [(1, 1), (3, 37), (4, 520)]:
        x = values(rows * cols, type_name).reshape(rows, cols)
        x[0] = 0
        x[-1] *= 1e-38 if type_name == "float" else 1
        codes = torch.full((rows, cols), 77, dtype=torch.int8)
        scb = torch.full((rows,), torch.nan)
        nonfinite = torch.zeros(1, dtype=torch.int32)
        kernel((rows, 1, 1), 256, x, Out(codes), Out(scb), Out(nonfinite), rows, cols)
        expected = quantize(x, QuantSpec("int8"))
        assert torch.equal(codes, expected.codes), (rows, cols)
        assert torch.equal(scb, expected.absmax), (rows, cols)
        assert nonfinite.item() == 0
