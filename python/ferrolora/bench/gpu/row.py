"""One measured work, and the judgement of all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ferrolora.bench.gpu.goals import MEANS, OURS, TOKENS, Goal, Work, works
from ferrolora.bench.table import duration

PASS, MISS, OPEN = "pass", "miss", "not measured"
HEADER = ("work", "ferrolora", "against", "goal", "measured", "verdict")


@dataclass(frozen=True)
class GpuRow:
    """What was measured of one work.

    Args:
        work: what was computed.
        unit: of the values, "s" or "bytes"; lower is better.
        values: contender -> its value. Empty where ours failed.
        error: relative error of our result, checked before it was timed; None where nothing is compared. Default None.
        notes: contender -> why it has no value. Default {}.
    """

    work: Work
    unit: str
    values: dict[str, float]
    error: float | None = None
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def is_failed(self) -> bool:
        """Whether ours has no value."""
        return OURS not in self.values

    def ratio(self, goal: Goal) -> float | None:
        """What a goal judges; None where one side was not measured."""
        if self.is_failed or goal.against not in self.values:
            return None
        return goal.ratio(self.values[OURS], self.values[goal.against])

    def to_json(self) -> dict[str, Any]:
        """As a result file has it."""
        work = {"group": self.work.group, "name": self.work.name, "m": self.work.m, "n": self.work.n, "k": self.work.k}
        row = {**work, "unit": self.unit, "values": self.values, "error": self.error, "notes": self.notes}
        if self.work.group == "train":
            row["tokens_per_second"] = {name: TOKENS / seconds for name, seconds in self.values.items()}
        return row

    @property
    def ours(self) -> str:
        """Our value for a reader, tokens a second with a train step."""
        if self.is_failed:
            return "failed"
        value = self.values[OURS]
        if self.unit != "s":
            return f"{value / 1e6:.1f} MB"
        return f"{duration(value)}, {TOKENS / value:.0f} tokens/s" if self.work.group == "train" else duration(value)


class Judgement(NamedTuple):
    """A goal with what was measured; `verdict` is "pass", "miss" or "not measured", `note` why there is no figure."""

    name: str
    ours: str
    goal: Goal
    ratio: float | None
    verdict: str
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """As the table has it."""
        measured = self.note if self.ratio is None else f"{self.ratio:.2f}x"
        return self.name, self.ours, self.goal.against, str(self.goal), measured, self.verdict

    def to_json(self) -> dict[str, Any]:
        """As a result file has it."""
        goal = {"against": self.goal.against, "bound": self.goal.bound, "at_most": self.goal.at_most}
        return {"name": self.name, **goal, "ratio": self.ratio, "verdict": self.verdict, "note": self.note}


def judge(rows: Sequence[GpuRow]) -> list[Judgement]:
    """Every goal of every row, then the geometric means."""
    found = [
        _judged(row.work.name, row.ours, goal, row.ratio(goal), _note(row, goal))
        for row in rows
        for goal in row.work.goals
    ]
    for group, name, goal in MEANS:
        members = [row for row in rows if row.work.group == group]
        ratios = [ratio for row in members if (ratio := row.ratio(goal)) is not None]
        # A mean over what happened to run is another quantity: it is judged over the whole group or not at all.
        whole = bool(members) and len(ratios) == len(members)
        mean = geometric_mean(ratios) if whole else None
        found.append(_judged(name, "", goal, mean, f"{len(ratios)} of {len(members)} rows measured"))
    return found


def _judged(name: str, ours: str, goal: Goal, ratio: float | None, note: str) -> Judgement:
    if ratio is None:
        return Judgement(name, ours, goal, None, OPEN, note)
    return Judgement(name, ours, goal, ratio, PASS if goal.is_met(ratio) else MISS)


def _note(row: GpuRow, goal: Goal) -> str:
    return row.notes.get(OURS) or row.notes.get(goal.against, "")


def geometric_mean(ratios: Sequence[float]) -> float:
    """`(Π r)^(1/n)`.

    Raises:
        ValueError: no ratio, or one that is not above 0.
    """
    if not ratios:
        raise ValueError("a geometric mean needs at least one ratio")
    return math.exp(math.fsum(math.log(ratio) for ratio in ratios) / len(ratios))


def result_json(header: dict[str, Any], gpu: str, command: str, rows: Sequence[GpuRow]) -> dict[str, Any]:
    """A result file: machine, GPU, command, rows, and the judgement of every goal."""
    judged = [line.to_json() for line in judge(rows)]
    return {"machine": header, "gpu": gpu, "command": command, "rows": [row.to_json() for row in rows], "goals": judged}


def read_rows(content: dict[str, Any]) -> list[GpuRow]:
    """The rows of a result file, with the goals of today's table.

    Raises:
        KeyError: a work that the table does not have.
    """
    known = {work.name: work for work in works()}
    return [
        GpuRow(known[row["name"]], row["unit"], row["values"], row["error"], row["notes"]) for row in content["rows"]
    ]
