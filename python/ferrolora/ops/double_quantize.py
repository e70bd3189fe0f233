"""`ferrolora::double_quantize`: the float32 scales of 4-bit blocks to 8-bit codes, their scales and their mean."""

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.cuda.launch import prepare, ready, run
from ferrolora.ops.library import define
from ferrolora.spec import NESTED_BLOCK_SIZE


def _fake(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = absmax.numel()
    codes = absmax.new_empty((blocks,), dtype=torch.uint8)
    nested_absmax = absmax.new_empty((-(-blocks // NESTED_BLOCK_SIZE),))
    return codes, nested_absmax, absmax.new_empty(())


def _cpu(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, nested_absmax, offset = _fake(absmax)
    mean = _native.double_quantize(absmax.contiguous(), codes, nested_absmax, torch.get_num_threads())
    return codes, nested_absmax, offset.fill_(mean)


def _cuda(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, nested_absmax, offset = _fake(absmax)
    given = {"absmax": ready(absmax), "offset": offset, "codes": codes, "nested": nested_absmax}
    for op, names in (("absmax_mean", ("absmax", "offset")), ("quantize_absmax", tuple(given))):
        launch = prepare(absmax.get_device(), op, torch.float32, 1, absmax.numel())
        assert launch is not None  # no library function stands for it
        run(launch, absmax.get_device(), {name: given[name] for name in names})
    return codes, nested_absmax, offset


define(
    "double_quantize(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor offset)",
    cpu=_cpu,
    cuda=_cuda,
    fake=_fake,
)
