"""`ferrolora::dequantize_4bit`: packed 4-bit codes and scales back to floats, fresh or into a caller's tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.cuda.launch import ready
from ferrolora.ops.checks import require_float
from ferrolora.ops.decode import decode
from ferrolora.ops.library import define
from ferrolora.ops.weight import SCHEMA, native_weight


def _fake(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    require_float("dequantize_4bit", "the output", dtype)
    return codes.new_empty(shape, dtype=dtype)


def _cpu(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = _fake(codes, absmax, nested_absmax, offset, quant_type, block_size, shape, dtype)
    _cpu_out(codes, absmax, nested_absmax, offset, quant_type, block_size, out)
    return out


def _cuda(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    out = _fake(codes, absmax, nested_absmax, offset, quant_type, block_size, shape, dtype)
    decode(out, 1, out.numel(), codes, absmax, nested_absmax, offset, quant_type, block_size)
    return out


def _fake_out(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    out: Tensor,
) -> None:
    require_float("dequantize_4bit_out", "out", out.dtype)


def _cpu_out(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    out: Tensor,
) -> None:
    _fake_out(codes, absmax, nested_absmax, offset, quant_type, block_size, out)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    _native.dequantize_4bit(
        *native_weight(codes, absmax, nested_absmax, offset),
        quant_type,
        block_size,
        target,
        torch.get_num_threads(),
    )
    if target is not out:
        out.copy_(target)


def _cuda_out(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    out: Tensor,
) -> None:
    _fake_out(codes, absmax, nested_absmax, offset, quant_type, block_size, out)
    target = ready(out)
    decode(target, 1, out.numel(), codes, absmax, nested_absmax, offset, quant_type, block_size)
    if target is not out:
        out.copy_(target)


define(
    f"dequantize_4bit({SCHEMA}, SymInt[] shape, ScalarType dtype) -> Tensor",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
define(
    f"dequantize_4bit_out({SCHEMA}, Tensor(a!) out) -> ()",
    cpu=_cpu_out,
    cuda=_cuda_out,
    fake=_fake_out,
)
