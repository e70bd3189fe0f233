"""Rows as a chart: how fast each contender is beside the ceiling, or beside the peer where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ferrolora.bench.contender import BITSANDBYTES, COPY, OURS, PEFT, TORCH
from ferrolora.bench.row import Entry, Row, times_as_fast
from ferrolora.bench.table import label

COLORS = {OURS: "#d1495b", BITSANDBYTES: "#30638e", PEFT: "#30638e", TORCH: "#edae49", COPY: "#8d99ae"}


class Bar(NamedTuple):
    """One right entry: its label, its speed where its reference has 1, and its color."""

    name: str
    speed: float
    color: str


def plot(rows: Sequence[Row], file: Path, description: str = "") -> None:
    """Draw one group of bars a row, on a logarithmic axis, from the line at 1. Wrong results have no bar.

    Args:
        rows: measured rows.
        file: where to; its ending tells the format: .png, .svg, .pdf.
        description: kept in the metadata of an SVG. Default "": none.
    """
    # Figure alone, not pyplot: no global backend is chosen and no display is needed.
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    groups = [(f"{row.suite} {row.work}\n{row.dtype}", bars(row)) for row in rows]
    height = sum(max(len(group), 1) + 0.7 for _, group in groups)
    # Text stays text and names are not drawn by chance, so that the same rows give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ferrolora"}):
        figure = Figure(figsize=(8, 0.9 + 0.25 * height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        place, ticks = 0.0, []
        for _, group in groups:
            ticks.append(place + max(len(group) - 1, 0) / 2)
            for bar in group:
                axes.barh(place, bar.speed - 1.0, left=1.0, color=bar.color, height=0.85)
                axes.annotate(f" {bar.name}: {bar.speed:.2f}", (max(bar.speed, 1.0), place), va="center", fontsize=7)
                place += 1
            place += 0.7 + (not group)
        axes.set_yticks(ticks, [name for name, _ in groups], fontsize=8)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.3, y=0.02)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8)
        references = dict.fromkeys(name for row in rows if (name := reference(row)))
        axes.set_xlabel(f"times as fast as {' or '.join(references)} (the line at 1)", fontsize=8)
        metadata = {"Date": None, "Description": description} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=120, metadata=metadata)


def bars(row: Row) -> list[Bar]:
    """The right entries on the threads of the run, but for the one they are held against."""
    against = reference(row)
    found = []
    for entry in row.entries:
        if entry.threads != row.threads or entry.library == against:
            continue
        speed = _speed(row, entry, against)
        if speed is not None:
            found.append(Bar(label(entry, row.threads), speed, COLORS[entry.library]))
    return found


def reference(row: Row) -> str:
    """The library whose speed is 1: the ceiling, else the peer, else ""."""
    names = (row.ceiling, PEFT)
    return next((name for name in names if any(entry.library == name for entry in row.entries)), "")


def _speed(row: Row, entry: Entry, against: str) -> float | None:
    other = row.find(against, output=entry.output) or row.find(against)
    return None if other is None else times_as_fast(entry, other)
