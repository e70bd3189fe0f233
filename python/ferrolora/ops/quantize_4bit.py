"""`ferrolora::quantize_4bit`: a float tensor to packed 4-bit codes and one float32 scale a block."""

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.cuda.launch import prepare, ready, run
from ferrolora.ops.checks import require_float
from ferrolora.ops.finite import finite_flag, require_finite
from ferrolora.ops.library import define


def _empty(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    numel = x.numel()
    codes = torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8, device=x.device)
    return codes, torch.empty((-(-numel // block_size),), dtype=torch.float32, device=x.device)


def _fake(x: Tensor, quant_type: str, block_size: int, name: str | None = None) -> tuple[Tensor, Tensor]:
    require_float("quantize_4bit", "x", x.dtype)
    return _empty(x, block_size)


def _cpu(x: Tensor, quant_type: str, block_size: int, name: str | None = None) -> tuple[Tensor, Tensor]:
    codes, absmax = _fake(x, quant_type, block_size, name)
    _native.quantize_4bit(x.contiguous(), quant_type, block_size, codes, absmax, torch.get_num_threads(), name)
    return codes, absmax


def _cuda(x: Tensor, quant_type: str, block_size: int, name: str | None = None) -> tuple[Tensor, Tensor]:
    codes, absmax = _fake(x, quant_type, block_size, name)
    if x.numel() == 0:
        return codes, absmax
    index, flag = x.get_device(), finite_flag(x)
    launch = prepare(index, "quantize", x.dtype, 1, x.numel(), quant_type=quant_type, block_size=block_size)
    assert launch is not None  # no library function stands for it
    run(launch, index, {"x": ready(x), "codes": codes, "absmax": absmax, "nonfinite": flag})
    require_finite(flag, x, name)
    return codes, absmax


define(
    "quantize_4bit(Tensor x, str quant_type, int block_size, str? name=None) -> (Tensor codes, Tensor absmax)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
