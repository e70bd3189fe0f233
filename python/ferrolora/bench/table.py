"""Rows and targets as cells of text, for a terminal and for a page alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ferrolora.bench.contender import FRESH, OURS
from ferrolora.bench.row import Entry, Row, times_as_fast
from ferrolora.bench.targets import Judged

ROW_HEADER = ("work", "library", "time", "quartiles", "GB/s", "GFLOP/s", "of ceiling", "ours is", "peak", "remark")
TARGET_HEADER = ("target", "against", "goal", "measured", "verdict")


def row_cells(row: Row) -> list[tuple[str, ...]]:
    """One line an entry. A wrong result has no time, and its remark says why.

    "of ceiling" is the ceiling's time over the entry's; "ours is" how many times as fast ours is as the entry.
    """
    return [_entry_cells(row, entry) for entry in row.entries]


def target_cells(judged: Sequence[Judged]) -> list[tuple[str, ...]]:
    """One line a target."""
    return [
        (
            line.target.name,
            line.target.against,
            line.target.goal,
            "" if line.ratio is None else f"{line.ratio:.2f}x",
            line.verdict,
        )
        for line in judged
    ]


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The header of a result."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    load = "" if machine["load_average"] is None else f", load average {machine['load_average']:.1f}"
    return [
        f"{machine['cpu']}, {machine['cores']} cores; {machine['threads']} threads, {machine['date']}{load}",
        f"instruction sets: {' '.join(machine['instruction_sets'])}",
        f"ferrolora can use {', '.join(machine['available_isas'])}; used {machine['ferrolora_isa']}",
        f"{versions}, python {machine['python']}, OMP_WAIT_POLICY {machine['omp_wait_policy']}",
    ]


def without_empty_columns(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[tuple[str, ...]]]:
    """The table without the columns in which every row is empty."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [tuple(row[i] for i in kept) for row in rows]


def duration(seconds: float) -> str:
    """Three digits of a time with its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-6)} µs"


def label(entry: Entry, threads: int) -> str:
    """The library, and in what its entry differs from the plain one."""
    remarks = [entry.output + " output"] if entry.output != FRESH else []
    if entry.threads != threads:
        remarks.append("1 thread" if entry.threads == 1 else f"{entry.threads} threads")
    return entry.library + (f" ({', '.join(remarks)})" if remarks else "")


def _entry_cells(row: Row, entry: Entry) -> tuple[str, ...]:
    seconds, spread = entry.median, entry.quartiles
    work = f"{row.work} {row.dtype}"
    peak = "" if entry.peak_bytes is None else f"{_digits(entry.peak_bytes / 1e6)} MB"
    remark = entry.note if entry.right else f"WRONG: {entry.note}"
    if seconds is None or spread is None:
        return (work, label(entry, row.threads), *[""] * 6, peak, remark)
    ceiling, ours = row.ceiling_of(entry), row.find(OURS, output=entry.output) or row.find(OURS)
    share = None if ceiling is None else times_as_fast(entry, ceiling)
    lead = None if ours is None or ours is entry else times_as_fast(ours, entry)
    return (
        work,
        label(entry, row.threads),
        duration(seconds),
        f"{duration(spread[0])} to {duration(spread[1])}",
        "" if entry.bytes is None else _digits(entry.bytes / seconds / 1e9),
        "" if entry.flops is None else _digits(entry.flops / seconds / 1e9),
        "" if share is None else f"{share:.2f}",
        "" if lead is None else f"{lead:.2f}x",
        peak,
        remark,
    )


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
