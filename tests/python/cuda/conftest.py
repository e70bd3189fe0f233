"""`emulate(sm)` makes the CUDA operators run on CPU tensors, for the length of a test."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the test packages have no names under importlib's mode

from emulated import Emulated

USERS = ("quantize_4bit", "double_quantize", "int8", "decode", "linear_cuda")  # of `prepare` and `run`


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Emulated]:
    """`emulate(sm, fused_rows=None)`: the operators' CUDA functions then take CPU tensors."""

    def start(sm: int, fused_rows: int | None = None) -> Emulated:
        machine = Emulated(sm, fused_rows)
        for name in USERS:
            module: Any = importlib.import_module(f"ferrolora.ops.{name}")
            monkeypatch.setattr(module, "prepare", machine.prepare)
            monkeypatch.setattr(module, "run", machine.run)
        monkeypatch.setattr("ferrolora.cuda.workspace.weight", machine.weight)
        monkeypatch.setattr("torch._C._cuda_getCurrentRawStream", lambda index: 0)
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
        return machine

    return start
