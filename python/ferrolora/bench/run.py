"""Measure cases: check every contender, time those that are right in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ferrolora.bench.contender import OURS, Case, Contender
from ferrolora.bench.plan import Work
from ferrolora.bench.row import Entry, Row
from ferrolora.bench.suites.registry import SUITES
from ferrolora.bench.timing import in_turns, torch_threads
from ferrolora.bench.verdict import Verdict

# What a library raises for a problem it cannot do; with another error the run ends.
REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError)


def measure(work: Sequence[Work], peers: frozenset[str], threads: int, rounds: int) -> Iterator[Row]:
    """The rows of a plan, one after the other.

    Args:
        work: what to measure.
        peers: what the rows of the peers are called.
        threads: torch threads.
        rounds: timed turns of each contender.
    """
    for suite, problem in work:
        with torch_threads(threads):
            row = measure_case(SUITES[suite].case(problem, peers), rounds)
        yield row


def measure_case(case: Case, rounds: int) -> Row:
    """Check every contender of a case, and time the right ones in turns."""
    threads = torch.get_num_threads()
    judged = [_judge(contender, contender.threads or threads) for contender in case.contenders]
    right = [i for i, (verdict, _) in enumerate(judged) if verdict.right]
    calls = [(judged[i][1], case.contenders[i].threads or threads) for i in right]
    times = dict(zip(right, in_turns(calls, rounds), strict=True))
    entries = []
    for i, (contender, (verdict, _)) in enumerate(zip(case.contenders, judged, strict=True)):
        entries.append(
            Entry(
                library=contender.library,
                right=verdict.right,
                note=verdict.note,
                error=verdict.error,
                output=contender.output,
                threads=contender.threads or threads,
                seconds=tuple(times.get(i, ())),
                bytes=contender.bytes,
                flops=contender.flops,
                peak_bytes=contender.peak_bytes() if contender.peak_bytes and verdict.right else None,
            )
        )
    return Row(case.suite, case.problem.work, case.problem.dtype, tuple(entries), case.ceiling)


def _judge(contender: Contender, threads: int) -> tuple[Verdict, Callable[[], Any]]:
    """The verdict on one call, and the call."""
    try:
        with torch_threads(threads):
            call = contender.prepare()
            return contender.check(call()), call
    except REFUSALS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Verdict(False, f"refused: {reason}"), lambda: None


def wrong_results(rows: Sequence[Row]) -> list[str]:
    """The rows in which a result of ours was wrong, and why."""
    return [
        f"{row.name}: {entry.note}"
        for row in rows
        for entry in row.entries
        if entry.library == OURS and not entry.right
    ]
