"""Rows as a chart: how fast each contender is, the ceiling or else the peer being 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ferrolora.bench.contender import COPY, OURS, PEFT
from ferrolora.bench.row import Entry, Row, times_as_fast
from ferrolora.bench.table import label

COLORS = {OURS: "#d1495b", COPY: "#8d99ae"}
OTHERS = ("#30638e", "#edae49", "#66a182", "#8d99ae")


def plot(rows: Sequence[Row], file: Path, description: str = "") -> None:
    """Draw one group of bars a row, on a logarithmic axis. Wrong results have no bar.

    Args:
        rows: measured rows.
        file: where to; its ending tells the format: .png, .svg, .pdf.
        description: kept in the metadata of an SVG. Default "": none.
    """
    # Figure alone, not pyplot: no global backend is chosen and no display is needed.
    import matplotlib
    from matplotlib.figure import Figure

    groups = [(f"{row.suite} {row.work}\n{row.dtype}", bars(row)) for row in rows]
    count = sum(len(group) + 1 for _, group in groups)
    # Text stays text and names are not drawn by chance, so that the same rows give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ferrolora"}):
        figure = Figure(figsize=(8, 1.2 + 0.22 * count), layout="constrained")
        axes = figure.add_subplot()
        place, ticks = 0.0, []
        for _, group in groups:
            ticks.append(place + (len(group) - 1) / 2)
            for name, speed, color in group:
                axes.barh(place, speed, color=color, height=0.85)
                axes.annotate(f" {name}: {speed:.2f}", (speed, place), va="center", fontsize=7)
                place += 1
            place += 1
        axes.set_yticks(ticks, [name for name, _ in groups], fontsize=8)
        axes.set_xscale("log")
        axes.margins(x=0.35)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("speed, times that of the line at 1 (logarithmic)")
        metadata = {"Date": None, "Description": description} if file.suffix == ".svg" else {}
        figure.savefig(file, dpi=120, metadata=metadata)


def bars(row: Row) -> list[tuple[str, float, str]]:
    """(label, speed, color) of each right entry, relative to the ceiling, or to the peer where there is none."""
    others = iter(OTHERS)
    found = []
    for entry in row.entries:
        color = COLORS.get(entry.library) or next(others)
        against = _reference(row, entry)
        speed = None if against is None else times_as_fast(entry, against)
        if speed is not None:
            found.append((label(entry, row.threads), speed, color))
    return found


def _reference(row: Row, entry: Entry) -> Entry | None:
    """What stands at 1: the ceiling, the peer, or ours where it was measured alone."""
    names = [row.ceiling] if row.ceiling else [PEFT, OURS]
    found = (row.find(name, output=entry.output) or row.find(name) for name in names)
    return next((candidate for candidate in found if candidate is not None and candidate.seconds), None)
