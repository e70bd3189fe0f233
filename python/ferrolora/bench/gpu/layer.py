"""One linear with LoRA: a step of it, the bytes it saves, and the host's part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ferrolora.bench.gpu import peers
from ferrolora.bench.gpu.goals import DENSE, IDEAL, OURS, PEFT, RANK, UNSLOTH, Work
from ferrolora.bench.gpu.operands import DTYPE, branch, normal, relative_error
from ferrolora.bench.gpu.row import GpuRow
from ferrolora.bench.gpu.timing import device_seconds, host_seconds
from ferrolora.ops.linear import LowRank, linear
from ferrolora.ops.quantize import quantize


def measure_step(work: Work) -> GpuRow:
    """Forward and backward, beside PEFT, Unsloth, and what a frozen layer in 16 bits needs."""
    m, n, k = work.m, work.n, work.k
    qt, lora, dy, x = quantize(normal(n, k)), branch(n, k), normal(m, n), normal(m, k).requires_grad_()
    dense = qt.dequantize(DTYPE)
    error = relative_error(work.name, linear(x, qt, lora=lora).detach(), _formula(x, dense, lora))

    def ours() -> None:
        torch.autograd.backward(linear(x, qt, lora=lora), dy)

    def frozen() -> None:
        F.linear(x.detach(), dense)
        torch.mm(dy, dense)

    calls: dict[str, Sequence[Any]] = {OURS: [ours], DENSE: [frozen]}
    notes: dict[str, str] = {}
    peers.add_peer(PEFT, lambda: peers.peft_step(x, dense, lora, dy), calls, notes)
    peers.add_peer(UNSLOTH, lambda: peers.unsloth_step(x, dense, lora, dy), calls, notes)
    return GpuRow(work, "s", device_seconds(calls, captured=False), error, notes)


def measure_saved(work: Work, device: str = "cuda") -> GpuRow:
    """What autograd keeps of a call beyond parameters, beside one x and one S in 16 bits."""
    m, n, k = work.m, work.n, work.k
    qt, lora, x = quantize(normal(n, k, device)), branch(n, k, device), normal(m, k, device).requires_grad_()
    held = {t.data_ptr() for t in (qt.codes, qt.absmax, qt.nested_absmax, qt.offset, lora.A, lora.B) if t is not None}
    kept = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in held else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(x, qt, lora=lora)
    return GpuRow(work, "bytes", {OURS: float(kept), IDEAL: 2.0 * m * (k + RANK)})


def measure_host(work: Work) -> GpuRow:
    """Host time of one launch of the fused linear with LoRA and of `F.linear`."""
    n, k = work.n, work.k
    qt, lora, x = quantize(normal(n, k)), branch(n, k), normal(work.m, k)
    dense = qt.dequantize(DTYPE)
    with torch.no_grad():
        error = relative_error(work.name, linear(x, qt, lora=lora), _formula(x, dense, lora))
        seconds = {
            OURS: host_seconds(lambda: linear(x, qt, lora=lora)),
            DENSE: host_seconds(lambda: F.linear(x, dense)),
        }
    return GpuRow(work, "s", seconds, error)


def _formula(x: Tensor, dense: Tensor, lora: LowRank) -> Tensor:
    """In float32."""
    with torch.no_grad():
        low = x.float() @ lora.A.t() @ lora.B.t()
        return F.linear(x.float(), dense.float()) + lora.scaling * low
