"""One library training one model in a process of its own; answers one JSON line for each line it reads.

    python -m ferrolora.bench.train.worker LIBRARY MODEL DTYPE THREADS

`memory` builds the model and takes steps, reporting resident memory; `ready`, `step` and `check` time steps one by one,
so that two workers can take turns, and compare the gradients with a float twin.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

import torch

from ferrolora.bench.contender import OURS, PEFT
from ferrolora.bench.problem import DTYPES
from ferrolora.bench.resident import is_measurable, peak_bytes, settle
from ferrolora.bench.train import gradients
from ferrolora.bench.train.adapt import build
from ferrolora.bench.train.models import MODELS, batch_of

# Imported before the idle memory is read, so that it holds the code of the models and libraries.
CODE = {
    OURS: ("ferrolora",),
    PEFT: ("bitsandbytes", "peft"),
}
MODEL_CODE = ("transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama")


class Worker:
    """The model under test and its optimizer."""

    def __init__(self, library: str, name: str, dtype: str) -> None:
        self.library, self.model, self.dtype = library, MODELS[name], DTYPES[dtype]
        self.batch = batch_of(self.model)
        for module in (*CODE[library], *MODEL_CODE):
            importlib.import_module(module)

    def build(self) -> None:
        """Make the model and the optimizer."""
        self.network = build(self.library, self.model, self.dtype)
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4)

    def train_step(self) -> float:
        """Seconds for forward, backward and optimizer."""
        start = time.perf_counter()
        self.network(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def memory(self) -> dict[str, Any]:
        """Bytes above the idle process: the built model, and the peak of training steps."""
        if not is_measurable():
            return {}
        idle = settle()
        self.build()
        built = settle()
        for _ in range(3):
            self.train_step()
        return {"model_bytes": built - idle, "peak_bytes": peak_bytes() - idle}

    def ready(self) -> dict[str, Any]:
        """Build and warm up."""
        self.build()
        for _ in range(2):
            self.train_step()
        return {}

    def step(self) -> dict[str, Any]:
        """Time one step."""
        return {"seconds": self.train_step()}

    def check(self) -> dict[str, Any]:
        """Error of the gradients and its bound."""
        return gradients.check(self.library, self.model, self.dtype)._asdict()


def main() -> None:
    """Answer requests until the input ends."""
    library, name, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    worker = Worker(library, name, dtype)
    for line in sys.stdin:
        answer = getattr(worker, line.strip())()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
