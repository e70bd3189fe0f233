"""The CUDA operators on CPU tensors: the planner plans, and the emulator of `tests/kernels` runs what it planned.

So everything between an operator and the hardware is tested without a GPU: which kernels are composed, what the plan
says of their grids and arguments, and the kernels themselves. Only the driver's own calls are left out.
"""

import functools
import math
import struct
from typing import Any

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.cuda.launch import problem
from kernels.emulator import Kernel, Out


class Emulated:
    """Stands for `ferrolora.cuda.launch` and `workspace`, for one architecture.

    Args:
        sm: the architecture.
        fused_rows: the crossover; None takes the planner's.
    """

    def __init__(self, sm: int, fused_rows: int | None = None) -> None:
        self.sm = sm
        self.fused_rows = fused_rows
        self.launched: list[str] = []

    def prepare(
        self,
        index: int,
        op: str,
        dtype: torch.dtype,
        n: int,
        k: int,
        m: int = 0,
        quant_type: str = "nf4",
        block_size: int = 64,
        nested: bool = False,
        rank: int = 0,
        lora_dtype: torch.dtype | None = None,
        bias_dtype: torch.dtype | None = None,
        dropout_p: float = 0.0,
        kernel: str | None = None,
    ) -> dict[str, Any] | None:
        names = {
            name: None if value is None else str(value).removeprefix("torch.")
            for name, value in (("dtype", dtype), ("lora_dtype", lora_dtype), ("bias_dtype", bias_dtype))
        }
        stored = {"quant_type": quant_type, "block_size": block_size, "nested": nested}
        asked = problem(
            op,
            n=n,
            k=k,
            m=m,
            rank=rank,
            dropout_p=dropout_p,
            fused_rows=self.fused_rows,
            kernel=kernel,
            **names,
            **stored,
        )
        return _native.cuda_plan(asked, self.sm, 4)  # few multiprocessors: small problems then have large grids

    def run(self, plan: dict[str, Any], index: int, given: dict[str, Any]) -> None:
        self.launched.append(plan["entry"])
        kernel = _kernel(plan["file"], plan["entry"], tuple(sorted(plan["constants"].items())))
        values = [_value(argument, given) for argument in plan["arguments"]]
        threads, *others = plan["block"]
        assert others == [1, 1]
        kernel(tuple(plan["grid"]), threads, *values, shared=plan["shared"])
        for argument, value in zip(plan["arguments"], values, strict=True):
            if argument["role"] == "counters":
                assert not value.tensor.any(), f"{plan['entry']} leaves its counters set"

    def weight(self, shape: tuple[int, int], dtype: torch.dtype, index: int, stream: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype)


@functools.cache
def _kernel(file: str, entry: str, constants: tuple[tuple[str, str], ...]) -> Kernel:
    return Kernel(file, entry, dict(constants))


def _value(argument: dict[str, Any], given: dict[str, Any]) -> Any:
    """What the emulator takes for one argument of a plan; checks what the native launcher checks."""
    name, role = argument["name"], argument["role"]
    if role == "fixed":
        return _number(argument["type"], argument["bits"])
    if role == "number":
        return float(given[name])
    if role == "scratch":
        return Out(torch.full((argument["numel"],), math.nan))
    if role == "counters":
        return Out(torch.zeros(argument["numel"], dtype=torch.int32))
    tensor = given[name]
    assert isinstance(tensor, Tensor), f"{name} is missing"
    assert str(tensor.dtype) == f"torch.{argument['dtype']}", name
    assert tensor.numel() == argument["numel"], name
    assert tensor.is_contiguous(), name
    return Out(tensor)


def _number(kind: str, bits: int) -> int | float | None:
    if kind == "void*":
        assert bits == 0
        return None
    return struct.unpack("<f", struct.pack("<I", bits))[0] if kind == "float" else bits
