"""`ferrolora::quantize_blockwise` and `dequantize_blockwise`: 8-bit dynamic map, one float32 scale a block."""

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.errors import ShapeError, UnsupportedError
from ferrolora.ops.checks import require_device, require_float
from ferrolora.ops.finite import require_finite
from ferrolora.ops.library import define

_SMALLEST_SCALE = 1e-38  # keeps 1/absmax finite, as in the native kernel


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
    require_device("quantize_blockwise", x, ("dynamic8", block_size))
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
    require_device("dequantize_blockwise", codes, ("dynamic8", block_size), absmax=absmax)
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


def _cuda_quantize(x: Tensor, block_size: int, name: str | None = None) -> tuple[Tensor, Tensor]:
    """The CPU kernel's bytes from torch's own operators: no training step waits for this codec."""
    _require_block_size(block_size)
    codes, absmax = _fake_quantize(x, block_size, name)
    flat = x.reshape(-1).float()
    require_finite(~torch.isfinite(flat).all(), x, name)
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    torch.amax(rows.abs(), dim=1, out=absmax)
    scaled = rows * (1.0 / absmax.clamp_min(_SMALLEST_SCALE)).unsqueeze(1)
    table = _table(x.device).double()  # midpoints of float32 values are exact in float64
    nearest = torch.bucketize(scaled.double(), (table[:-1] + table[1:]) / 2.0)  # a tie goes to the lower code
    return codes.copy_(nearest.view(-1)[: x.numel()].view(x.shape)), absmax


def _cuda_dequantize(codes: Tensor, absmax: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    _require_block_size(block_size)
    require_float("dequantize_blockwise", "the output", dtype)
    if absmax.numel() != -(-codes.numel() // block_size):
        raise ShapeError(
            f"absmax: expected {-(-codes.numel() // block_size)} elements for {codes.numel()} codes in blocks of "
            f"{block_size}, got {absmax.numel()}"
        )
    scales = absmax.repeat_interleave(block_size)[: codes.numel()].view(codes.shape)
    return (_table(codes.device)[codes.long()] * scales).to(dtype)


def _require_block_size(block_size: int) -> None:
    if not 1 <= block_size <= 4096:
        raise UnsupportedError(f"block_size must be from 1 to 4096, got {block_size}")


def _table(device: torch.device) -> Tensor:
    return torch.tensor(_native.codebook("dynamic8"), dtype=torch.float32, device=device)


define(
    "quantize_blockwise(Tensor x, int block_size, str? name=None) -> (Tensor codes, Tensor absmax)",
    cpu=_cpu_quantize,
    cuda=_cuda_quantize,
    fake=_fake_quantize,
)
define(
    "dequantize_blockwise(Tensor codes, Tensor absmax, int block_size, ScalarType dtype) -> Tensor",
    cpu=_cpu_dequantize,
    cuda=_cuda_dequantize,
    fake=_fake_dequantize,
)
