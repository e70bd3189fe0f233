"""The train step's gradients are checked by what each library computes; a worker that dies is an entry."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest
import torch

from ferrolora.bench.contender import OURS, PEFT
from ferrolora.bench.peers import choose_peers
from ferrolora.bench.train import gradients, step
from ferrolora.bench.train.models import MODELS, Model, batch_of, llama
from ferrolora.bench.train.process import Died, Process

SMALL = Model(lambda: llama(64, 128, 2, 4), (2, 16), "CAUSAL_LM", "lm_head", "small")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT calls it
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("library", [OURS, PEFT])
def test_the_gradients_of_both_libraries_are_right(library: str, dtype: torch.dtype) -> None:
    choose_peers(None)
    found = gradients.check(library, SMALL, dtype)
    assert found.error <= found.bound
    assert library == PEFT or found.error > 0.0  # PEFT over decoded weights is the oracle itself
    if dtype == torch.float32:
        assert found.bound == 2048 * 2.0**-24  # the vocabulary is the longest sum


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_wrong_gradient_is_outside_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gradients.gradients

    def wrong(network: Any, batch: Any) -> dict[str, torch.Tensor]:
        found = right(network, batch)
        quantized = any(type(module).__name__ == "QuantLinear" for module in network.modules())
        return {name: gradient * (1.01 if quantized else 1.0) for name, gradient in found.items()}

    monkeypatch.setattr(gradients, "gradients", wrong)
    found = gradients.check(OURS, SMALL, torch.float32)
    assert found.error > found.bound


def test_gradients_of_different_parameters_are_refused() -> None:
    one = {"a": torch.ones(1)}
    with pytest.raises(KeyError, match="gradients of different parameters"):
        gradients.relative_error(one, {"b": torch.ones(1)})


def test_the_batch_is_the_same_in_every_process() -> None:
    first, second = batch_of(MODELS["llama-1024"]), batch_of(MODELS["llama-1024"])
    assert first["input_ids"].shape == (4, 256)
    assert torch.equal(first["input_ids"], second["input_ids"])


class FakeProcess:
    """Answers from a table; a missing answer is a death."""

    answers: dict[str, dict[str, list[dict[str, Any]]]]
    asked: list[tuple[str, str]]

    def __init__(self, library: str, model: str, dtype: str, threads: int) -> None:
        self.library = library

    def ask(self, what: str) -> dict[str, Any]:
        self.asked.append((self.library, what))
        answers = self.answers[self.library].get(what, [])
        if not answers:
            raise Died("Segmentation fault")
        return answers.pop(0)

    def close(self) -> None:
        pass


def healthy(milliseconds: float) -> dict[str, list[dict[str, Any]]]:
    return {
        "check": [{"error": 1e-6, "bound": 1e-4}],
        "memory": [{"model_bytes": 10, "peak_bytes": 100}],
        "ready": [{}],
        "step": [{"seconds": milliseconds / 1e3}, {"seconds": 2 * milliseconds / 1e3}],
    }


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeProcess]:
    FakeProcess.answers = {OURS: healthy(1.0), PEFT: healthy(2.0)}
    FakeProcess.asked = []
    monkeypatch.setattr(step, "Process", FakeProcess)
    return FakeProcess


def test_a_row_holds_times_in_turns_and_memory(fake: type[FakeProcess]) -> None:
    row = step.measure_step("llama-512", "float32", frozenset({PEFT}), threads=2, rounds=2)
    ours, theirs = row.entries
    assert (ours.library, ours.seconds, ours.peak_bytes, ours.model_bytes) == (OURS, (0.001, 0.002), 100, 10)
    assert (theirs.library, theirs.seconds, theirs.right) == (PEFT, (0.002, 0.004), True)
    assert [library for library, what in fake.asked if what == "step"] == [OURS, PEFT, OURS, PEFT]


def test_wrong_gradients_are_not_timed(fake: type[FakeProcess]) -> None:
    fake.answers[OURS]["check"] = [{"error": 2e-4, "bound": 1e-4}]
    row = step.measure_step("llama-512", "float32", frozenset({PEFT}), threads=2, rounds=2)
    assert (row.entries[0].right, row.entries[0].seconds) == (False, ())
    assert row.entries[0].note == "gradients off by 0.0002, the bound is 0.0001"
    assert (OURS, "step") not in fake.asked
    assert row.entries[1].right


@pytest.mark.parametrize("request_", ["check", "memory", "ready", "step"])
def test_a_worker_that_dies_is_an_entry_and_the_other_goes_on(fake: type[FakeProcess], request_: str) -> None:
    fake.answers[PEFT][request_] = fake.answers[PEFT][request_][1:]
    row = step.measure_step("llama-512", "float32", frozenset({PEFT}), threads=2, rounds=2)
    assert row.entries[0].seconds == (0.001, 0.002)
    assert (row.entries[1].right, row.entries[1].seconds) == (False, ())
    assert row.entries[1].note == "died: Segmentation fault"


@pytest.mark.slow
def test_a_process_gives_the_last_words_of_its_worker() -> None:
    with closing(Process("nobody", "llama-512", "float32", 1)) as process, pytest.raises(Died, match="'nobody'"):
        process.ask("ready")


def test_importing_the_command_loads_no_peer() -> None:
    code = "import sys, ferrolora.cli.bench; print({'peft', 'bitsandbytes', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
