"""A train step of a model of billions of weights, drawn and quantized on the device."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ferrolora.bench import contender
from ferrolora.bench.gpu.goals import OURS, PEFT, TOKENS, Work
from ferrolora.bench.gpu.operands import DTYPE
from ferrolora.bench.gpu.peers import NOT_INSTALLED, failure, is_installed
from ferrolora.bench.gpu.row import GpuRow
from ferrolora.bench.train.adapt import build
from ferrolora.bench.train.models import Model
from ferrolora.cuda import free_workspaces

# Llama 3.1 8B.
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": TOKENS,
}
LIBRARIES = {OURS: contender.OURS, PEFT: contender.PEFT}
WARM_UP, ROUNDS = 3, 10


def model(sizes: dict[str, int], device: str, tokens: int = TOKENS) -> Model:
    """A Llama of random bfloat16 weights, made on the device."""

    def drawn() -> Any:
        transformers: Any = import_module("transformers")
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes), dtype=DTYPE)

    return Model(drawn, (1, tokens), "CAUSAL_LM", "lm_head", "Llama of random weights")


def stepper(library: str, what: Model, device: str) -> Callable[[], Tensor]:
    """A train step that returns its loss, under autocast, as the Trainer takes it in bfloat16.

    Args:
        library: a key of LIBRARIES.
        what: the model.
        device: where it is made and trained.
    """
    network = build(LIBRARIES[library], what, DTYPE)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-4)
    vocabulary = network.config.vocab_size
    tokens = torch.randint(vocabulary, what.batch, generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> Tensor:
        with torch.autocast(device, DTYPE):
            loss: Tensor = network(input_ids=tokens, labels=tokens).loss
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure_train(time: Work, memory: Work) -> list[GpuRow]:
    """Seconds of a step and peak memory, one library after the other: both models together may not fit."""
    seconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    notes: dict[str, str] = {}
    for library in LIBRARIES:
        if library != OURS and not is_installed(library):
            notes[library] = NOT_INSTALLED
            continue
        try:
            seconds[library], peaks[library] = _measured(library)
        except Exception as error:  # noqa: BLE001  # too little memory for one must not lose the figures of the other
            notes[library] = failure(error)
    return [GpuRow(time, "s", seconds, notes=notes), GpuRow(memory, "bytes", peaks, notes=notes)]


def _measured(library: str) -> tuple[float, float]:
    """Median seconds, and the most bytes allocated."""
    free_workspaces()
    gc.collect()
    torch.cuda.empty_cache()
    idle = torch.cuda.memory_allocated()
    step = stepper(library, model(SHAPE, "cuda"), "cuda")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP):
        step()
    seconds = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        step()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return statistics.median(seconds), float(torch.cuda.max_memory_allocated() - idle)
