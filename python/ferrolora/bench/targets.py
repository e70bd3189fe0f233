"""The table of targets: what each row has to reach on which kind of host, and whether it did.

The numbers stand in `targets.json`, in groups: every size with every type of a group has the same target.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ferrolora.bench.contender import OURS
from ferrolora.bench.plan import Work, plan
from ferrolora.bench.problem import DTYPES
from ferrolora.bench.row import Row, times_as_fast
from ferrolora.bench.shapes import parse_shapes
from ferrolora.bench.suites.registry import SUITES

PASS, MISS, OPEN = "pass", "miss", "not measured"


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Args:
        suite: the suite of its row.
        work: the sizes of its row.
        dtype: the type of its row.
        measure: "speed" (times as fast as the peer), "memory" (share of the peer's peak) or "scaling" (times as fast as
            on one thread).
        against: the library of the other entry, or "1 thread".
        limit: the ratio to reach; None where this kind of host has no target.
        is_floor: whether the ratio has to be at least the limit; else at most.
    """

    suite: str
    work: str
    dtype: str
    measure: str
    against: str
    limit: float | None
    is_floor: bool

    @property
    def name(self) -> str:
        """What is measured, in words."""
        what = {"speed": "", "memory": ", peak memory", "scaling": ", scaling"}[self.measure]
        return f"{self.suite} {self.work} {self.dtype}{what}"

    @property
    def goal(self) -> str:
        """The limit with its sign."""
        return "-" if self.limit is None else f"{'≥' if self.is_floor else '≤'} {self.limit:g}x"

    def ratio(self, row: Row) -> float | None:
        """The measured ratio; None if a side of it is missing or wrong."""
        ours = row.find(OURS)
        theirs = row.find(OURS, threads=1) if self.measure == "scaling" else row.find(self.against)
        if ours is None or theirs is None:
            return None
        if self.measure != "memory":
            return times_as_fast(ours, theirs)
        return ours.peak_bytes / theirs.peak_bytes if ours.peak_bytes and theirs.peak_bytes else None


@dataclass(frozen=True)
class Judged:
    """A target and what was measured: the ratio, and "pass", "miss" or "not measured"."""

    target: Target
    ratio: float | None
    verdict: str


def column(machine: dict[str, Any]) -> str:
    """Which column of the table holds for the machine of a result: a key of `column_names`."""
    if "avx512_bf16" not in machine["instruction_sets"]:
        return "A"
    return "B16" if any(name in machine["ferrolora_isa"] for name in ("bf16", "amx")) else "B"


def column_names() -> dict[str, str]:
    """What each column stands for."""
    names: dict[str, str] = _table()["columns"]
    return names


def target_threads() -> int:
    """The number of threads the targets are meant for."""
    return int(_table()["threads"])


def targets(host: str) -> list[Target]:
    """Every line of the table for a kind of host, a key of `column_names`."""
    lines = []
    for group in _table()["targets"]:
        is_floor = "at_least" in group
        limits = group["at_least" if is_floor else "at_most"]
        limit = limits.get(host, limits.get(host[0]))  # B16 is B where it has no number of its own
        lines += [
            Target(group["suite"], work, dtype, group["measure"], group["against"], limit, is_floor)
            for dtype in group["dtypes"]
            for work in group["works"]
        ]
    return lines


def target_plan() -> list[Work]:
    """The work that measures every target once, in the order of suites and types, the rows of one weight together."""
    found = {
        work for target in targets("B") for work in plan([target.suite], parse_shapes(target.work), [target.dtype])
    }
    suites, dtypes = list(SUITES), list(DTYPES)

    def place(work: Work) -> tuple[int, ...]:
        problem = work.problem
        return suites.index(work.suite), dtypes.index(problem.dtype), problem.n, problem.k, problem.m or 0

    return sorted(found, key=place)


def judge(rows: Sequence[Row], machine: dict[str, Any]) -> list[Judged]:
    """Hold rows against the targets of their machine; on another number of threads than the table's none is decided."""
    by_name = {row.name: row for row in rows}
    judged = []
    for target in targets(column(machine)):
        row = by_name.get(f"{target.suite} {target.work} {target.dtype}")
        ratio = None if row is None else target.ratio(row)
        if ratio is None or target.limit is None or machine["threads"] != target_threads():
            verdict = OPEN if ratio is None else "-"
        else:
            verdict = PASS if (ratio >= target.limit if target.is_floor else ratio <= target.limit) else MISS
        judged.append(Judged(target, ratio, verdict))
    return judged


def _table() -> Any:
    return json.loads((files("ferrolora.bench") / "targets.json").read_text(encoding="utf-8"))
