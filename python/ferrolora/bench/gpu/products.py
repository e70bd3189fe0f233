"""Decoding, and products with few rows: rotating weights, replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ferrolora.bench.gpu import peers
from ferrolora.bench.gpu.goals import BITSANDBYTES, CEILING, OURS, Work
from ferrolora.bench.gpu.operands import DTYPE, normal, relative_error
from ferrolora.bench.gpu.row import GpuRow
from ferrolora.bench.gpu.timing import copies, device_seconds
from ferrolora.cuda.launch import Given, prepare, run
from ferrolora.ops.dequantize import dequantize
from ferrolora.ops.linear import linear
from ferrolora.ops.quantize import quantize
from ferrolora.tensor import QuantTensor


def measure_dequantize(work: Work) -> GpuRow:
    """Packed weight to bfloat16, beside a copy that reads and writes as many bytes."""
    n, k = work.n, work.k
    weights = [quantize(normal(n, k)) for _ in range(copies(n * k // 2))]
    out = torch.empty(n, k, dtype=DTYPE, device="cuda")
    calls: dict[str, Sequence[Any]] = {
        OURS: [lambda qt=qt: dequantize(qt, out=out) for qt in weights],
        CEILING: _copies((weights[0].nbytes + out.nbytes) // 2, len(weights)),
    }
    error = relative_error(work.name, dequantize(weights[0], out=out), weights[0].to("cpu").dequantize(DTYPE).cuda())
    notes: dict[str, str] = {}
    peers.add_peer(BITSANDBYTES, lambda: peers.decoders([normal(n, k) for _ in weights]), calls, notes)
    return GpuRow(work, "s", device_seconds(calls, captured=True), error, notes)


def measure_product(work: Work) -> GpuRow:
    """A product without gradients, beside a copy that moves the packed weight's bytes."""
    m, n, k = work.m, work.n, work.k
    weights, x = [quantize(normal(n, k)) for _ in range(copies(n * k // 2))], normal(m, k)
    with torch.no_grad():
        right = F.linear(x.float(), weights[0].dequantize(torch.float32))
        error = relative_error(work.name, linear(x, weights[0]), right)
        calls: dict[str, Sequence[Any]] = {
            OURS: [lambda qt=qt: linear(x, qt) for qt in weights],
            CEILING: _copies(weights[0].nbytes // 2, len(weights)),
        }
        notes: dict[str, str] = {}
        peers.add_peer(BITSANDBYTES, lambda: peers.products(x, [normal(n, k) for _ in weights]), calls, notes)
        return GpuRow(work, "s", device_seconds(calls, captured=True), error, notes)


def _copies(nbytes: int, count: int) -> list[Callable[[], Tensor]]:
    """Copies between buffers of `nbytes`, which move twice that; each has its own, as the weights do."""
    pairs = [[torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2)] for _ in range(count)]
    return [lambda pair=pair: pair[0].copy_(pair[1]) for pair in pairs]  # type: ignore[misc]  # mypy cannot infer it


def fused_crossover(n: int = 4096, k: int = 4096) -> int:
    """The most rows for which the fused product beats decoding first, on the current device, for nf4 and bfloat16."""
    qt: QuantTensor = quantize(normal(n, k))
    best = 0
    for m in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512):
        x = normal(m, k)
        seconds = device_seconds(
            {kernel: [_forced(x, qt, kernel)] for kernel in ("gemm_4bit", "library")}, captured=True
        )
        if seconds["gemm_4bit"] > seconds["library"]:
            break
        best = m
    return best


def _forced(x: Tensor, qt: QuantTensor, kernel: str) -> Callable[[], None]:
    """The product by the fused kernel, or by decoding first."""
    index, (n, k), y = x.get_device(), qt.shape, torch.empty(x.shape[0], qt.shape[0], dtype=x.dtype, device=x.device)
    if kernel == "library":
        dense = torch.empty(n, k, dtype=x.dtype, device=x.device)

        def decoded() -> None:
            dequantize(qt, out=dense)
            torch.mm(x, dense.t(), out=y)

        return decoded
    nested = qt.nested_absmax is not None
    launch = prepare(index, "linear", x.dtype, n, k, x.shape[0], *qt.codec, nested, kernel=kernel)
    assert launch is not None  # a kernel that is asked for by name is never the library
    given: Given = {
        "codes": qt.codes,
        "absmax": qt.absmax,
        "nested": qt.nested_absmax,
        "offset": qt.offset,
        "x": x,
        "y": y,
    }
    return lambda: run(launch, index, given)
