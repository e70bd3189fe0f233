"""One QLoRA train step: ferrolora against PEFT + bitsandbytes, time and peak memory.

Same float weights, same NF4 + double quantization, same rank-16 LoRA values, same batch. Each library runs in a process
of its own, so that one that dies is an entry and not the end. Steps are timed in turns, one library after the other;
memory is measured in fresh processes, above the same process with everything imported. The gradients are compared
first.

How torch's idle OpenMP threads wait (OMP_WAIT_POLICY of the environment: default, passive, active) changes the times of
both; the results name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import Any

from ferrolora.bench.contender import OURS, PEFT
from ferrolora.bench.row import Entry, Row
from ferrolora.bench.train.process import Died, Process

SUITE = "train"
DTYPES = ("float32", "bfloat16")  # torch's CPU kernels train in these


def measure_step(model: str, dtype: str, peers: frozenset[str], threads: int, rounds: int) -> Row:
    """The row of one model.

    Args:
        model: a key of `MODELS` that is available.
        dtype: one of `DTYPES`: type of the parameters and of the computation.
        peers: what the rows of the peers are called; `PEFT` is measured if it is among them.
        threads: torch threads.
        rounds: timed steps of each library.
    """
    libraries = [OURS, *([PEFT] if PEFT in peers else [])]
    answers, times = _steps_in_turns(libraries, (model, dtype, threads), rounds)
    for library in libraries:
        if not _verdict(answers[library]):
            with closing(Process(library, model, dtype, threads)) as worker:
                answers[library] |= _attempt(worker, "memory")
    entries = [_entry(library, answers[library], times[library], threads) for library in libraries]
    return Row(SUITE, model, dtype, tuple(entries))


def _steps_in_turns(
    libraries: Sequence[str], problem: tuple[str, str, int], rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """What each library answered, and the seconds of its steps; one that is wrong or dies goes on no further."""
    answers: dict[str, dict[str, Any]] = {library: {} for library in libraries}
    times: dict[str, list[float]] = {library: [] for library in libraries}
    with ExitStack() as stack:
        workers = {library: stack.enter_context(closing(Process(library, *problem))) for library in libraries}
        for request in ("check", "ready", *["step"] * rounds):
            for library, worker in workers.items():
                if request != "check" and _verdict(answers[library]):
                    continue
                answer = _attempt(worker, request)
                times[library] += [answer.pop("seconds")] if "seconds" in answer else []
                answers[library] |= answer
    return answers, times


def _attempt(worker: Process, request: str) -> dict[str, Any]:
    try:
        return worker.ask(request)
    except Died as reason:
        return {"died": str(reason)}


def _verdict(answer: dict[str, Any]) -> str:
    """What is wrong, or ""."""
    if "died" in answer:
        return f"died: {answer['died']}"
    if not answer["error"] <= answer["bound"]:
        return f"gradients off by {answer['error']:.2g}, the bound is {answer['bound']:.2g}"
    return ""


def _entry(library: str, answer: dict[str, Any], times: list[float], threads: int) -> Entry:
    wrong = _verdict(answer)
    return Entry(
        library=library,
        right=not wrong,
        note=wrong,
        error=answer.get("error"),
        threads=threads,
        seconds=() if wrong else tuple(times),
        peak_bytes=None if wrong else answer.get("peak_bytes"),
        model_bytes=None if wrong else answer.get("model_bytes"),
    )
