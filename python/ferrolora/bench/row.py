"""A measured row: what each contender did, as it is printed, written to JSON and read back."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from ferrolora.bench.contender import FRESH, REUSED


@dataclass(frozen=True)
class Entry:
    """One contender's part of a row.

    Args:
        library: whose it is.
        right: whether its result was right; a wrong one has no times.
        note: why it is wrong, or in what it departs from what was asked. Default "".
        error: relative error of its result; None where the check is one of equality. Default None.
        output: "fresh" or "reused". Default "fresh".
        threads: torch threads it ran on. Default 1.
        seconds: time of one call, one for each round; empty if it is wrong. Default ().
        bytes: the least that one call reads and writes; None if not counted. Default None.
        flops: of one call; None if there are none. Default None.
        peak_bytes: memory at the peak of a call, above what it starts with; None if not measured. Default None.
        model_bytes: memory the model holds at rest; None but for a train step. Default None.
    """

    library: str
    right: bool
    note: str = ""
    error: float | None = None
    output: str = FRESH
    threads: int = 1
    seconds: tuple[float, ...] = ()
    bytes: int | None = None
    flops: int | None = None
    peak_bytes: int | None = None
    model_bytes: int | None = None

    @property
    def median(self) -> float | None:
        """Median seconds, or None."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """The quarter and three-quarter points of the seconds, or None."""
        return quartiles(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Row:
    """One problem and its contenders.

    Args:
        suite: "quantize", "dequantize", "linear", "backward", "lora" or "train".
        work: the sizes MxNxK or NxK, or the name of a model.
        dtype: "float32", "bfloat16" or "float16".
        entries: one a contender.
        ceiling: the library that stands for what the machine allows; "" where none does. Default "".
    """

    suite: str
    work: str
    dtype: str
    entries: tuple[Entry, ...]
    ceiling: str = ""

    @property
    def name(self) -> str:
        """Suite, sizes and type."""
        return f"{self.suite} {self.work} {self.dtype}"

    @property
    def threads(self) -> int:
        """The threads of the run: the most that any contender had."""
        return max((entry.threads for entry in self.entries), default=1)

    def find(self, library: str, threads: int | None = None, output: str | None = None) -> Entry | None:
        """The entry of a library on `threads` threads (None: those of the run), a reused output before a fresh one."""
        wanted = self.threads if threads is None else threads
        for kind in (REUSED, FRESH) if output is None else (output,):
            for entry in self.entries:
                if (entry.library, entry.threads, entry.output) == (library, wanted, kind):
                    return entry
        return None

    def ceiling_of(self, entry: Entry) -> Entry | None:
        """The entry that stands for what the machine allows, with the same kind of output where there is one."""
        if not self.ceiling or entry.threads != self.threads:
            return None
        return self.find(self.ceiling, output=entry.output) or self.find(self.ceiling)


def quartiles(values: tuple[float, ...]) -> tuple[float, float]:
    """The quarter and three-quarter points; of one value, the value."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def times_as_fast(entry: Entry, other: Entry) -> float | None:
    """How many times as fast as `other` the entry is: the median over the rounds; None if either is wrong."""
    if not entry.seconds or not other.seconds:
        return None
    return statistics.median(theirs / ours for ours, theirs in zip(entry.seconds, other.seconds, strict=True))


def to_json(row: Row) -> dict[str, Any]:
    """A row as JSON types; what an entry does not have is left out."""
    content = asdict(row)
    content["entries"] = [
        {key: value for key, value in entry.items() if value not in (None, "", ())} for entry in content["entries"]
    ]
    return content


def from_json(content: dict[str, Any]) -> Row:
    """The row that `to_json` wrote."""
    entries = tuple(Entry(**{**entry, "seconds": tuple(entry.get("seconds", ()))}) for entry in content["entries"])
    return Row(**{**content, "entries": entries})
