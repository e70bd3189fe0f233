"""`ferrolora::quantize_int8` and `dequantize_int8`: row-wise absmax, `code = round(w * 127 / absmax)`."""

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.cuda.launch import prepare, ready, run
from ferrolora.errors import ShapeError
from ferrolora.ops.checks import require_float
from ferrolora.ops.decode import decode
from ferrolora.ops.finite import finite_flag, require_finite
from ferrolora.ops.library import define


def _fake_quantize(x: Tensor, name: str | None = None) -> tuple[Tensor, Tensor]:
    require_float("quantize_int8", "x", x.dtype)
    if x.dim() != 2:
        raise ShapeError(f"quantize_int8: x must be [rows, columns], not {list(x.shape)}")
    codes = x.new_empty(x.shape, dtype=torch.int8)
    return codes, x.new_empty((x.shape[0],), dtype=torch.float32)


def _cpu_quantize(x: Tensor, name: str | None = None) -> tuple[Tensor, Tensor]:
    codes, scb = _fake_quantize(x, name)
    _native.quantize_int8(x.contiguous(), codes, scb, torch.get_num_threads(), name)
    return codes, scb


def _cuda_quantize(x: Tensor, name: str | None = None) -> tuple[Tensor, Tensor]:
    codes, scb = _fake_quantize(x, name)
    if x.numel() == 0:
        return codes, scb.zero_()
    index, flag = x.get_device(), finite_flag(x)
    launch = prepare(index, "quantize", x.dtype, *x.shape, quant_type="int8")
    assert launch is not None  # no library function stands for it
    run(launch, index, {"x": ready(x), "codes": codes, "scb": scb, "nonfinite": flag})
    require_finite(flag, x, name)
    return codes, scb


def _fake_dequantize(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    require_float("dequantize_int8", "the output", dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


def _cpu_dequantize(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    out = _fake_dequantize(codes, scb, dtype)
    _cpu_dequantize_out(codes, scb, out)
    return out


def _cuda_dequantize(codes: Tensor, scb: Tensor, dtype: torch.dtype) -> Tensor:
    out = _fake_dequantize(codes, scb, dtype)
    decode(out, codes.shape[0], codes.shape[1], codes, scb, None, None, "int8", 64)
    return out


def _fake_dequantize_out(codes: Tensor, scb: Tensor, out: Tensor) -> None:
    require_float("dequantize_int8_out", "out", out.dtype)


def _cpu_dequantize_out(codes: Tensor, scb: Tensor, out: Tensor) -> None:
    _fake_dequantize_out(codes, scb, out)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    _native.dequantize_int8(codes.contiguous(), scb.contiguous(), target.view(codes.shape), torch.get_num_threads())
    if target is not out:
        out.copy_(target)


def _cuda_dequantize_out(codes: Tensor, scb: Tensor, out: Tensor) -> None:
    _fake_dequantize_out(codes, scb, out)
    target = ready(out)
    decode(target, codes.shape[0], codes.shape[1], codes, scb, None, None, "int8", 64)
    if target is not out:
        out.copy_(target)


define(
    "quantize_int8(Tensor x, str? name=None) -> (Tensor codes, Tensor scb)",
    cpu=_cpu_quantize,
    cuda=_cuda_quantize,
    fake=_fake_quantize,
)
define(
    "dequantize_int8(Tensor codes, Tensor scb, ScalarType dtype) -> Tensor",
    cpu=_cpu_dequantize,
    cuda=_cuda_dequantize,
    fake=_fake_dequantize,
)
define(
    "dequantize_int8_out(Tensor codes, Tensor scb, Tensor(a!) out) -> ()",
    cpu=_cpu_dequantize_out,
    cuda=_cuda_dequantize_out,
    fake=_fake_dequantize_out,
)
