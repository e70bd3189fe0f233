"""Bitsandbytes' own operators on our CPU kernels, for code that calls bitsandbytes and shall stay as it is.

Opt in: `ferrolora.integrations.bitsandbytes.enable()`. The operators are registered with torch.library for the dispatch
key CPU, which is how bitsandbytes' backends register theirs; `disable()` drops the registration and gives back what was
there. GPUs are left to bitsandbytes.

`gemm_4bit` is fused: the weight is never decoded in full. `gemv_4bit` is taken over only where bitsandbytes has no CPU
kernel of its own, because that kernel reads a layout of the weight that the arguments do not tell from the usual one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.errors import UnsupportedError
from ferrolora.ops.checks import FLOAT_TYPES
from ferrolora.spec import NESTED_BLOCK_SIZE

_LIBRARY: tuple[Any, list[str]] | None = None  # with the names in it; the registrations live as long as it does

_MAP = "dynamic8"


def enable() -> list[str]:
    """Run bitsandbytes' 4-bit and block-wise operators on CPU tensors by our kernels, in this process.

    `quantize_4bit`, `dequantize_4bit`, `gemm_4bit` (so `matmul_4bit` and `Linear4bit`), `quantize_blockwise`,
    `dequantize_blockwise` (so its 8-bit optimizers), and `gemv_4bit` where bitsandbytes has no CPU kernel for it.
    Codes and scales keep their bytes. Calling it again changes nothing.

    Returns:
        The names of the operators that are now ours.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
        UnsupportedError: this version of bitsandbytes lacks one of the operators.
    """
    global _LIBRARY
    if _LIBRARY is None:
        importlib.import_module("bitsandbytes")  # defines the operators
        missing = [name for name in _KERNELS if not hasattr(torch.ops.bitsandbytes, name)]
        if missing:
            raise UnsupportedError(f"bitsandbytes has no operator {', '.join(missing)}; 0.50 and later have them all")
        ours = [name for name in _KERNELS if name != "gemv_4bit" or not _has_cpu_kernel(name)]
        library: Any = torch.library.Library("bitsandbytes", "IMPL")  # type: ignore[no-untyped-call]  # untyped there
        for name in ours:
            library.impl(name, _KERNELS[name], "CPU", allow_override=True)
        _LIBRARY = (library, ours)
    return list(_LIBRARY[1])


def disable() -> None:
    """Give the operators back to bitsandbytes; without `enable()` before it, nothing happens."""
    global _LIBRARY
    _LIBRARY = None  # torch drops the registrations with the library that holds them


def _has_cpu_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{name}", "CPU")


def _quantize_4bit(a: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    codes, absmax = torch.ops.ferrolora.quantize_4bit(a, quant_type, blocksize, None)
    return (codes if quant_storage == torch.uint8 else codes.view(-1).view(quant_storage).unsqueeze(1)), absmax


def _dequantize_4bit(
    a: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    out: Tensor = torch.ops.ferrolora.dequantize_4bit(
        _bytes(a), absmax.float(), None, None, quant_type, blocksize, shape, dtype
    )
    return out


def _gemm_4bit(
    a: Tensor,
    b: Tensor,
    shape_b: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    scales, nested, offset = absmax.float(), None, None
    if absmax_8bit is not None:
        if absmax_code is None or absmax_offset is None:
            raise UnsupportedError("gemm_4bit: absmax_8bit needs absmax_code and absmax_offset")
        if _is_dynamic_map(absmax_code):
            scales, nested, offset = absmax_8bit, absmax.float(), absmax_offset.float()
        else:
            scales = _look_up(absmax_8bit, absmax, absmax_code, NESTED_BLOCK_SIZE, torch.float32) + absmax_offset
    n, k = shape_b
    y: Tensor = torch.ops.ferrolora.linear(a, _bytes(b), scales, nested, offset, quant_type, blocksize, n, k, bias)
    return y


def _gemv_4bit(a: Tensor, b: Tensor, shape_b: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    # The operator is told the table and not its name; fp4's second value is positive, nf4's is not.
    return _gemm_4bit(a, b, shape_b, absmax, blocksize, "fp4" if code[1] > 0 else "nf4")


def _quantize_blockwise(a: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    if _is_dynamic_map(code) and blocksize <= 4096 and a.dtype in FLOAT_TYPES:
        codes, absmax = torch.ops.ferrolora.quantize_blockwise(a, blocksize, None)
        return codes, absmax
    # Another map: the definition in torch's operators, with ties to the lower code as everywhere.
    flat = a.reshape(-1).float()
    rows = torch.nn.functional.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)
    absmax = rows.abs().amax(1)
    scaled = (rows * (1.0 / absmax.clamp_min(1e-38)).unsqueeze(1)).clamp(-1, 1)
    nearest = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2)
    return nearest.view(-1)[: a.numel()].view(a.shape).to(torch.uint8), absmax


def _dequantize_blockwise(a: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    if _is_dynamic_map(code) and blocksize <= 4096 and dtype in FLOAT_TYPES:
        out: Tensor = torch.ops.ferrolora.dequantize_blockwise(a, absmax.float(), blocksize, dtype)
        return out
    return _look_up(a, absmax, code, blocksize, dtype)


def _look_up(a: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    scales = absmax.float().repeat_interleave(blocksize)[: a.numel()].view(a.shape)
    return (code[a.long()] * scales).to(dtype)


def _bytes(packed: Tensor) -> Tensor:
    """The packed bytes, whatever type they are stored as."""
    flat = packed.contiguous().view(-1)
    return (flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)).unsqueeze(1)


def _is_dynamic_map(code: Tensor) -> bool:
    """Whether `code` is the signed 8-bit dynamic map, up to the last bits in which its computations differ."""
    table = torch.tensor(_native.codebook(_MAP), dtype=torch.float32)
    return code.shape == table.shape and bool(((code - table).abs() <= math.ldexp(1, -22) * table.abs()).all())


_KERNELS: dict[str, Any] = {
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "gemm_4bit": _gemm_4bit,
    "gemv_4bit": _gemv_4bit,
    "quantize_blockwise": _quantize_blockwise,
    "dequantize_blockwise": _dequantize_blockwise,
}
