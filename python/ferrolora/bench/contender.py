"""One side of a comparison, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ferrolora.bench.problem import Problem
from ferrolora.bench.verdict import Verdict

OURS = "ferrolora"
TORCH = "torch dense"
BITSANDBYTES = "bitsandbytes"
PEFT = "PEFT + bitsandbytes"
COPY = "memory copy"
FRESH, REUSED = "fresh", "reused"


@dataclass(frozen=True)
class Contender:
    """An operation that a library does, ready to be called again and again.

    Args:
        library: whose it is.
        prepare: makes the operation: loads what it needs and returns the call that is timed.
        check: judges the result of one call.
        bytes: the least that one call has to read and write.
        flops: multiplications and additions of one call; None where there are none. Default None.
        output: "fresh" if each call allocates its result, "reused" if it writes into the same tensor. Default "fresh".
        threads: torch threads; None for those of the run. Default None.
        peak_bytes: measures the memory one call needs at its peak above what it starts with. Default None: not
            measured.
    """

    library: str
    prepare: Callable[[], Callable[[], Any]]
    check: Callable[[Any], Verdict]
    bytes: int
    flops: int | None = None
    output: str = FRESH
    threads: int | None = None
    peak_bytes: Callable[[], int | None] | None = None


@dataclass(frozen=True)
class Case:
    """The contenders of one problem, which take turns.

    Args:
        suite: the name of the suite.
        problem: what is computed.
        contenders: in the order of the table.
        ceiling: the library whose contender stands for what the machine allows.
    """

    suite: str
    problem: Problem
    contenders: tuple[Contender, ...]
    ceiling: str
