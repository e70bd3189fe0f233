"""`ferrolora::quantize_blockwise` and `dequantize_blockwise`: 8-bit dynamic map, one float32 scale a block."""

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.ops.checks import require_cpu, require_float
from ferrolora.ops.library import define


def quantize_blockwise(x: Tensor, block_size: int = 4096, name: str | None = None) -> tuple[Tensor, Tensor]:
    """Quantize to 8 bits in blocks: `code = index of the dynamic-map value nearest to x / absmax(block)`.

    Args:
        x: float32, float16 or bfloat16, any shape.
        block_size: values that share a scale, over the flattened tensor. Default 4096.
        name: what an error calls the tensor. Default None.

    Returns:
        Codes, uint8, the shape of x; scales, float32 `[ceil(numel / block_size)]`.

    Raises:
        QuantizationError: x holds NaN or infinity.
        UnsupportedError: another dtype, block size or device.

    Source: 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.
    """
    require_cpu("quantize_blockwise", x, ("dynamic8", block_size))
    codes, absmax = torch.ops.ferrolora.quantize_blockwise(x.detach(), block_size, name)
    return codes, absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, block_size: int = 4096, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The inverse of `quantize_blockwise`: `dynamic_map[code] * absmax(block)`, rounded once to dtype.

    Args:
        codes: uint8, any shape.
        absmax: float32 `[ceil(numel / block_size)]`.
        block_size: as it was quantized. Default 4096.
        dtype: float32, float16 or bfloat16. Default float32.

    Returns:
        A new tensor of the shape of codes.

    Raises:
        UnsupportedError: another dtype, block size or device.
        ShapeError: absmax has another length.
    """
    require_cpu("dequantize_blockwise", codes, ("dynamic8", block_size), absmax=absmax)
    out: Tensor = torch.ops.ferrolora.dequantize_blockwise(codes, absmax, block_size, dtype)
    return out


def _fake_quantize(x: Tensor, block_size: int, name: str | None = None) -> tuple[Tensor, Tensor]:
    require_float("quantize_blockwise", "x", x.dtype)
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, x.new_empty((-(-x.numel() // block_size),), dtype=torch.float32)


def _cpu_quantize(x: Tensor, block_size: int, name: str | None = None) -> tuple[Tensor, Tensor]:
    codes, absmax = _fake_quantize(x, block_size, name)
    _native.quantize_blockwise(x.contiguous(), block_size, codes.view(-1), absmax, torch.get_num_threads(), name)
    return codes, absmax


def _fake_dequantize(codes: Tensor, absmax: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    require_float("dequantize_blockwise", "the output", dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


def _cpu_dequantize(codes: Tensor, absmax: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    out = _fake_dequantize(codes, absmax, block_size, dtype)
    flat = codes.contiguous().view(-1)
    _native.dequantize_blockwise(flat, absmax.contiguous(), block_size, out.view(-1), torch.get_num_threads())
    return out


define(
    "quantize_blockwise(Tensor x, int block_size, str? name=None) -> (Tensor codes, Tensor absmax)",
    cpu=_cpu_quantize,
    fake=_fake_quantize,
)
define(
    "dequantize_blockwise(Tensor codes, Tensor absmax, int block_size, ScalarType dtype) -> Tensor",
    cpu=_cpu_dequantize,
    fake=_fake_dequantize,
)
