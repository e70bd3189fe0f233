"""The rows: dequantizing, few rows, a tile of rows, a step of the adapter, saved bytes, and the host's part."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ferrolora.bench.gpu.row import GpuRow
from ferrolora.bench.gpu.timing import copies, device_seconds, host_seconds
from ferrolora.cuda.launch import Given, prepare, run
from ferrolora.errors import FerroloraError
from ferrolora.ops.dequantize import dequantize
from ferrolora.ops.linear import LowRank, linear
from ferrolora.ops.quantize import quantize
from ferrolora.tensor import QuantTensor

# N x K of the seven linears of an 8B Llama layer: q and o, k and v, gate and up, down.
SEVEN = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
DTYPE = torch.bfloat16
RANK = 16


def rows() -> Iterator[GpuRow]:
    """Every row of the table of targets for a GPU, measured on the current device.

    Raises:
        FerroloraError: a result of ours is wrong; it is not timed.
    """
    yield _dequantize(4096, 14336)
    for n, k in SEVEN:
        yield _few_rows(1, n, k, {"ceiling": 0.7, "bitsandbytes": 1.3})
    for m in (2, 4, 8, 16, 32, 64):
        yield _few_rows(m, 4096, 4096, {"bitsandbytes": 0.95})
    for n, k in SEVEN:
        yield _adapter_step(4096, n, k)
    yield _host(4096, 4096)


def saved_bytes(m: int = 4096, n: int = 4096, k: int = 4096) -> float:
    """What autograd keeps of one linear with its adapter, over the ideal: one x and one S in 16 bits."""
    qt, x = quantize(_normal(n, k)), _normal(m, k).requires_grad_()
    lora = _branch(n, k)
    parameters = {t.data_ptr() for t in (qt.codes, qt.absmax, qt.nested_absmax, qt.offset, *lora[:2]) if t is not None}
    kept = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.data_ptr() in parameters else tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        linear(x, qt, lora=lora)
    return kept / (2 * m * (k + RANK))


def _dequantize(n: int, k: int) -> GpuRow:
    weights = [quantize(_normal(n, k)) for _ in range(copies(n * k // 2))]
    out = torch.empty(n, k, dtype=DTYPE, device="cuda")
    read = weights[0].nbytes
    source = torch.empty((read + out.nbytes) // 2, dtype=torch.uint8, device="cuda")  # a copy reads and writes as much
    target = torch.empty_like(source)
    calls: dict[str, Any] = {
        "ferrolora": [lambda qt=qt: dequantize(qt, out=out) for qt in weights],
        "ceiling": [lambda: target.copy_(source) for _ in weights],
    }
    error = _checked("dequantize", dequantize(weights[0], out=out), weights[0].to("cpu").dequantize(DTYPE).cuda())
    if find_spec("bitsandbytes"):
        bnb: Any = importlib.import_module("bitsandbytes.functional")

        packed = [bnb.quantize_4bit(_normal(n, k), compress_statistics=True, quant_type="nf4") for _ in weights]
        calls["bitsandbytes"] = [lambda p=p: bnb.dequantize_4bit(*p) for p in packed]
    seconds = device_seconds(calls, captured=True)
    return GpuRow(f"dequantize nf4+dq to bf16 {n}x{k}", seconds, error, {"ceiling": 0.85, "bitsandbytes": 1.25})


def _few_rows(m: int, n: int, k: int, at_least: dict[str, float]) -> GpuRow:
    weights, x = [quantize(_normal(n, k)) for _ in range(copies(n * k // 2))], _normal(m, k)
    right = F.linear(x.float(), weights[0].dequantize(torch.float32))
    error = _checked(f"linear {m}x{n}x{k}", linear(x, weights[0]), right)
    half = weights[0].nbytes // 2
    source, target = (torch.empty(half, dtype=torch.uint8, device="cuda") for _ in range(2))
    calls: dict[str, Any] = {
        "ferrolora": [lambda qt=qt: linear(x, qt) for qt in weights],
        "ceiling": [lambda: target.copy_(source) for _ in weights],  # moves the weight's bytes
    }
    if find_spec("bitsandbytes"):
        bnb: Any = importlib.import_module("bitsandbytes")

        packed = [
            bnb.functional.quantize_4bit(_normal(n, k), compress_statistics=True, quant_type="nf4") for _ in weights
        ]
        calls["bitsandbytes"] = [lambda p=p: bnb.matmul_4bit(x, p[0].t(), quant_state=p[1]) for p in packed]
    with torch.no_grad():
        return GpuRow(f"linear m={m} {n}x{k}", device_seconds(calls, captured=True), error, at_least)


def _adapter_step(m: int, n: int, k: int) -> GpuRow:
    qt, lora, dy = quantize(_normal(n, k)), _branch(n, k), _normal(m, n)
    x = _normal(m, k).requires_grad_()
    dense = qt.dequantize(DTYPE)
    y = linear(x, qt, lora=lora)
    right = F.linear(x.float(), dense.float()) + lora.scaling * (x.float() @ lora.A.float().t()) @ lora.B.float().t()
    error = _checked(f"linear + LoRA {m}x{n}x{k}", y.detach(), right.detach())

    def frozen() -> None:  # forward and dX of a frozen linear in 16 bits: what a step cannot do without
        F.linear(x.detach(), dense)
        torch.mm(dy, dense)

    calls: dict[str, Any] = {"ferrolora": [_step(lambda: linear(x, qt, lora=lora), dy)], "ceiling": [frozen]}
    if find_spec("bitsandbytes") and find_spec("peft"):
        bnb: Any = importlib.import_module("bitsandbytes")

        packed, state = bnb.functional.quantize_4bit(dense, compress_statistics=True, quant_type="nf4")
        a, b = (t.detach().to(DTYPE).requires_grad_() for t in lora[:2])

        def theirs() -> Tensor:  # the operations of PEFT's Linear4bit.forward
            result: Tensor = bnb.matmul_4bit(x, packed.t(), quant_state=state)
            return result + F.linear(F.linear(x, a), b) * lora.scaling

        calls["peft+bitsandbytes"] = [_step(theirs, dy)]
    seconds = device_seconds(calls, captured=False)
    return GpuRow(f"step m={m} {n}x{k} r={RANK}", seconds, error, {"ceiling": 0.88, "peft+bitsandbytes": 1.4})


def _host(n: int, k: int) -> GpuRow:
    qt, lora, x = quantize(_normal(n, k)), _branch(n, k), _normal(1, k)
    dense = qt.dequantize(DTYPE)
    with torch.no_grad():
        y = linear(x, qt, lora=lora)
        right = F.linear(x.float(), dense.float()) + lora.scaling * (x.float() @ lora.A.t()) @ lora.B.t()
        error = _checked("linear + LoRA, one row", y, right)
        seconds = {
            "ferrolora": host_seconds(lambda: linear(x, qt, lora=lora)),
            "F.linear": host_seconds(lambda: F.linear(x, dense)),
        }
    return GpuRow(f"host, fused linear + LoRA m=1 {n}x{k}", seconds, error, {"F.linear": 0.5})


def _step(forward: Callable[[], Tensor], dy: Tensor) -> Callable[[], None]:
    def step() -> None:
        torch.autograd.backward(forward(), dy)

    return step


def _normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=DTYPE, device="cuda")


def _branch(n: int, k: int) -> LowRank:
    a, b = torch.randn(RANK, k, device="cuda") / k**0.5, torch.randn(n, RANK, device="cuda")
    return LowRank(a.requires_grad_(), b.requires_grad_(), 0.5)


def _checked(work: str, got: Tensor, right: Tensor) -> float:
    """Relative error of a result.

    Each term is rounded at most four times to the type of got, by half of 2⁻⁷ of it for bfloat16, and the errors of a
    random product add up like its terms: relative to the norm they stay at that.
    """
    error = float((got.float() - right.float()).norm() / right.float().norm())
    most = 4 * torch.finfo(got.dtype).eps / 2
    if not error <= most:
        raise FerroloraError(f"{work}: the result is wrong by {error:.2e} of its norm, at most {most:.2e} is rounding")
    return error


def fused_crossover(n: int = 4096, k: int = 4096) -> int:
    """The most rows for which the fused product beats decoding first, on the current device, for nf4 and bfloat16."""
    qt: QuantTensor = quantize(_normal(n, k))
    best = 0
    for m in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512):
        x = _normal(m, k)
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
