"""Timing in turns: what disturbs the machine disturbs every contender alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

TURN_SECONDS = 0.02  # calls are repeated within a turn until it lasts about this long …
MOST_CALLS = 20  # … but not more often than this
SETTLE_BELOW = 0.1  # a call shorter than this is preceded by an untimed one in every turn


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run torch, and so the kernels, on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_turns(calls: Sequence[tuple[Callable[[], Any], int]], rounds: int) -> list[list[float]]:
    """Seconds of one call, for each of the calls and each round.

    Every call is warmed up, then in each round they take turns. A turn of a short call starts with an untimed one,
    since another's idle threads may still be waiting actively and the caches hold another's data, and is the mean of
    several.

    Args:
        calls: (what to call, on how many torch threads).
        rounds: turns of each.

    Returns:
        For each call, one time a round.
    """
    repeats = [_repeats(*call) for call in calls]
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for i, (run, threads) in enumerate(calls):
            with torch_threads(threads):
                if repeats[i].settle:
                    run()
                seconds[i].append(_mean_seconds(run, repeats[i].count))
    return seconds


class _Repeats:
    """How a turn of a call that takes `seconds` is laid out."""

    def __init__(self, seconds: float) -> None:
        self.count = min(MOST_CALLS, max(1, math.ceil(TURN_SECONDS / seconds)))
        self.settle = seconds < SETTLE_BELOW


def _repeats(run: Callable[[], Any], threads: int) -> _Repeats:
    with torch_threads(threads):
        run()
        return _Repeats(_mean_seconds(run, 1))


def _mean_seconds(run: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()  # the result is dropped at once, as a fresh output has to be paid for in every call
    return (time.perf_counter() - start) / count
