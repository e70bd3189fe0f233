"""Device time of calls in turns, over buffers that the caches do not hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[], Any]
ROUNDS = 20
COLD_BYTES = 512 * 2**20  # more than any L2 cache, so that each call finds its weight in memory


def copies(nbytes: int) -> int:
    """How many copies of an operand of `nbytes` one turn has to rotate through."""
    return max(2, min(64, -(-COLD_BYTES // nbytes)))


def device_seconds(contenders: dict[str, Sequence[Call]], captured: bool) -> dict[str, float]:
    """Median seconds of one call of each contender, which take turns.

    Args:
        contenders: name -> the same call on each copy of its operands.
        captured: replay the turn as a CUDA graph, so that the host's part does not count; else launch it.

    Returns: name -> seconds.
    """
    turns = {name: _graph(calls) if captured else _loop(calls) for name, calls in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn()
    for _ in range(ROUNDS):
        for name, turn in turns.items():
            start, end = _event(), _event()
            start.record()
            turn()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / len(contenders[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def host_seconds(call: Call, count: int = 200) -> float:
    """Seconds that the host needs to launch one call, the device not waited for."""
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - start) / count)
    return best


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no types here


def _loop(calls: Sequence[Call]) -> Call:
    def turn() -> None:
        for call in calls:
            call()

    turn()
    return turn


def _graph(calls: Sequence[Call]) -> Call:
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types here
    with torch.cuda.stream(stream):
        calls[0]()  # compiles, loads and allocates
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay
