"""One library training one model in a process of its own; answers one JSON line for each line it reads.

Started by train_step.py. `memory` builds the model and takes steps, reporting resident memory; `ready`, `step` and
`check` time steps one by one, so that two workers can take turns, and compare the gradients with a float twin.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from models import CASES, batch_of, build, dense_twin, gradients

STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes: VmRSS (now) or VmHWM (the peak since the last reset)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def settle() -> int:
    """Give freed memory back to the system, restart the peak, and return what is resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return resident("VmRSS")


class Worker:
    """The model under test and its optimizer."""

    def __init__(self, library: str, name: str) -> None:
        self.library, self.case = library, CASES[name]
        self.batch = batch_of(self.case)
        for module in {"ferrolora": ["ferrolora"], "bitsandbytes": ["bitsandbytes", "peft"]}[library]:
            __import__(module)
        import transformers.models.bert.modeling_bert
        import transformers.models.llama.modeling_llama  # noqa: F401  so that idle memory holds the code of the models

        self.idle = settle()

    def build(self) -> None:
        self.model = build(self.library, self.case)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def train_step(self) -> float:
        """Seconds for forward, backward and optimizer."""
        start = time.perf_counter()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def memory(self) -> dict[str, Any]:
        """Bytes above the idle process: the built model, and the peak of training steps."""
        self.build()
        built = settle()
        for _ in range(3):
            self.train_step()
        return {"model_bytes": built - self.idle, "step_peak_bytes": resident("VmHWM") - self.idle}

    def ready(self) -> dict[str, Any]:
        """Build and warm up."""
        self.build()
        for _ in range(2):
            self.train_step()
        return {"ready": True}

    def step(self) -> dict[str, Any]:
        return {"seconds": self.train_step()}

    def check(self) -> dict[str, Any]:
        """Relative error of all gradients together, against the float twin with the same adapter values."""
        model = build(self.library, self.case)
        expected = gradients(dense_twin(self.library, self.case, model), self.batch)
        found = gradients(model, self.batch)
        if expected.keys() != found.keys():
            raise KeyError(f"gradients of different parameters: {sorted(expected.keys() ^ found.keys())[:4]}")
        wrong = sum(((found[name] - g).double() ** 2).sum() for name, g in expected.items())
        whole = sum((g.double() ** 2).sum() for g in expected.values())
        return {"gradient_error": float((wrong / whole) ** 0.5)}


def main() -> None:
    library, name, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    worker = Worker(library, name)
    for line in sys.stdin:
        answer = getattr(worker, line.strip())()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
