"""The part of docs/BENCHMARKS.md about GPUs: the targets, and what `tests/gpu/run.py` measured of them.

Its results are `gpu-*.json`, as that script writes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import figures

from ferrolora.bench.gpu.goals import ABOUT, MEANS, works
from ferrolora.bench.gpu.row import HEADER, MISS, GpuRow, judge, read_rows

COMMAND = "python tests/gpu/run.py dist/ferrolora-*.whl"
NOT_MEASURED = """\
**Nothing here was measured yet: no kernel of ours has run on a GPU.** They were written, run on the emulator of
`cuda/host` against the CPU's kernels, and compiled for sm_75 to sm_120. The table is what they will be held to."""
HOW = f"""\
`{COMMAND}` on a machine with a GPU runs the tests and measures all of it in one go, without Rust or network; the file
it writes, moved to `benches/results/gpu-*.json`, turns this section into its tables."""


def section(results: Path) -> str:
    """The targets if no result is there, else each result, every goal judged."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("gpu-*.json"))]
    parts = ["## NVIDIA GPUs"]
    if not found:
        return "\n\n".join([*parts, NOT_MEASURED, HOW, targets()])
    for content in found:
        parts += [_head(content), figures.table(HEADER, _lines(read_rows(content["bench"])), left=3)]
    return "\n\n".join([*parts, HOW])


def targets() -> str:
    """Every goal, the same goals of a group in one line."""
    goals: dict[tuple[str, str, str], int] = {}
    for work in works():
        for goal in work.goals:
            key = (work.group, goal.against, str(goal))
            goals[key] = goals.get(key, 0) + 1
    rows = [(ABOUT[group], against, bound, str(count)) for (group, against, bound), count in goals.items()]
    rows += [(f"{mean.name}, over {ABOUT[mean.group]}", mean.goal.against, str(mean.goal), "1") for mean in MEANS]
    return figures.table(("work", "against", "goal", "rows"), rows, left=2)


def _head(content: dict[str, Any]) -> str:
    tests, bench = content["tests"], content["bench"]
    counted = f"{tests['passed']} tests passed, {tests['failed']} failed, {tests['skipped']} were skipped"
    versions = ", ".join(f"{name} {version}" for name, version in content["doctor"]["versions"].items())
    return f"### {bench['gpu']}, {content['date']}\n\n`{bench['command']}`; {content['wheel']}; {counted}. {versions}."


def _lines(rows: list[GpuRow]) -> list[tuple[str, ...]]:
    """As the command prints them, the misses in bold."""
    found = []
    for line in judge(rows):
        *cells, verdict = line.cells()
        found.append((*cells, f"**{verdict}**" if line.verdict == MISS else verdict))
    return found
