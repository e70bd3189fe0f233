"""Write docs/BENCHMARKS.md, its charts, and the figures of README.md from the committed results.

    python benches/report.py [--check] [--results DIR] [--root DIR]

No number is typed by hand. `bench-*.json` are results of `ferrolora bench`; trec.json and load_memory.json those of the
scripts in benches/python. With --check nothing is written; the exit status is 1 if a file is not what this would write.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import bounds
import figures
import gpu_figures

from ferrolora.bench import plot as plot_module
from ferrolora.bench.contender import BITSANDBYTES, OURS, PEFT, TORCH
from ferrolora.bench.result import Result, read_result
from ferrolora.bench.row import Row, times_as_fast, to_json
from ferrolora.bench.table import ROW_HEADER, TARGET_HEADER, label, row_cells, target_cells, without_empty_columns
from ferrolora.bench.targets import MISS, column, column_names, judge, target_threads

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- figures:begin -->\n", "<!-- figures:end -->"
PAGE = "docs/BENCHMARKS.md"
PEERS = (TORCH, BITSANDBYTES, PEFT)

CAVEATS = """\
- One machine a file, named with its tables, and often a virtual one whose neighbours are unknown; where its load
  average is above the threads of the run, other work disturbed it. Ratios carry over to like machines, times do not.
- All contenders of a row take turns in one process, after a warm-up. A time is the median over the rounds, with its
  quartiles; a ratio is the median of the rounds' own ratios. Whole models train in processes of their own, in turns
  too. A ratio in bold is below one: there ferrolora is the slower.
- A result is checked before it is timed: bytes against the reference twin, products against float64 with the bound of
  floating-point arithmetic, gradients of a model against a float model that holds the decoded weights. A wrong result
  has no time.
- The same weight is multiplied again and again, so that it is in the cache where it fits; a model with many layers
  finds it in memory. That favours whoever reads more bytes: dense torch.
- "Of ceiling" is the time of what the machine is known to do over the row's: a copy of the float weight, or torch's
  dense product of the same sizes and type. Four-bit weights are an eighth of the bytes, so that products with few rows
  exceed it.
- "Reused output" writes into the same tensor in every call; all others allocate it, and pay for fresh pages. `quantize`
  has no such argument; there the native functions are called over tensors that are kept. Products are the public calls,
  with fresh outputs on both sides.
- On processors with AVX-512 BF16, bitsandbytes' product without gradients computes in bfloat16 whatever the type of the
  activations. Such rows are held to bfloat16's bound and say so. It repacks the weight on its first call, outside the
  time. Its optional package `kernels`, which fetches another kernel, took part only where the versions name it.
- "PEFT + bitsandbytes" and ferrolora compute the gradients of x, A and B; dense torch beside them that of x alone, with
  no branch.
- Peak memory of a layer is what one forward and backward takes above the process that holds weight, x and dY; of a
  train step, above the idle process with everything imported.
"""


class Source(NamedTuple):
    """A result file and what it holds."""

    file: Path
    result: Result

    @property
    def is_targets(self) -> bool:
        """Whether the run was that of the table of targets."""
        return " --suite targets" in self.result.command


@dataclass(frozen=True)
class Chart:
    """A chart of rows, under the root; `key` names rows and drawing code, and stands in the file."""

    file: str
    rows: tuple[Row, ...]

    @property
    def key(self) -> str:
        """Hash of what the chart is drawn from."""
        content = json.dumps([to_json(row) for row in self.rows], sort_keys=True)
        code = Path(plot_module.__file__).read_text(encoding="utf-8")
        return "drawn from " + hashlib.sha256((content + code).encode()).hexdigest()


def sources(results: Path) -> list[Source]:
    """The results of `ferrolora bench`, the table of targets first."""
    found = [Source(file, read_result(file)) for file in sorted(results.glob("bench-*.json"))]
    return sorted(found, key=lambda source: not source.is_targets)


def charts(found: Sequence[Source]) -> list[Chart]:
    """Products in float32 by the number of rows, and train steps."""
    products = tuple(
        row
        for source in found
        if source.is_targets
        for row in source.result.rows
        if row.suite == "linear" and row.dtype == "float32"
    )
    steps = tuple(row for source in found for row in source.result.rows if row.suite == "train")
    drawn = (("docs/linear.svg", products), ("docs/train.svg", steps))
    return [Chart(file, rows) for file, rows in drawn if rows]


def benchmarks(found: Sequence[Source], results: Path) -> str:
    """The page: caveats, targets, where we lose, all tables, commands."""
    parts = ["# Benchmarks", "Written by `python benches/report.py` from the files it names.", "## Caveats", CAVEATS]
    parts += [_targets(source) for source in found if source.is_targets]
    parts += ["## Where ferrolora loses", _losses(found)]
    parts += ["## All rows", *[f"![{Path(chart.file).stem}]({Path(chart.file).name})" for chart in charts(found)]]
    for source in found:
        parts += _tables(source)
    parts += ["## Other measurements", *_others(results, "../benches/results")]
    commands = [f"{source.result.command}" for source in found]
    commands += [
        "sh examples/trec.sh",
        "python benches/python/load_memory.py",
        gpu_figures.COMMAND,
        "python benches/report.py",
    ]
    parts += [gpu_figures.section(results)]
    parts += ["## Commands", "\n".join(["```sh", *commands, "```"])]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _targets(source: Source) -> str:
    machine = source.result.machine
    judged = judge(source.result.rows, machine)
    rows = [
        (*cells[:-1], f"**{cells[-1]}**" if line.verdict == MISS else cells[-1])
        for cells, line in zip(target_cells(judged), judged, strict=True)
    ]
    missed = sum(line.verdict == MISS for line in judged)
    passed = sum(line.verdict == "pass" for line in judged)
    count = f"{passed} of {len(judged)} pass, {missed} miss"
    kind = f"For {column_names()[column(machine)]}, {target_threads()} threads: {count}."
    note = "≥ 2x: at least twice as fast as what it is measured against; ≤ 0.5x: at most half its memory."
    body = figures.table(TARGET_HEADER, rows, left=2)
    parts = [f"## Targets\n\n{kind} {note} {_origin(source)}", body]
    missed_lines = bounds.bounds(source.result.rows, judged)
    if missed_lines:
        parts += ["### What bounds the misses", (bounds.__doc__ or "").partition("\n\n")[2].strip()]
        parts += [figures.table(bounds.HEADER, missed_lines, left=2), bounds.TRIED.rstrip()]
    return "\n\n".join(parts)


def _losses(found: Sequence[Source]) -> str:
    lines = []
    for source in found:
        for row in source.result.rows:
            for theirs in row.entries:
                ours = row.find(OURS, theirs.threads, theirs.output) or row.find(OURS, theirs.threads)
                speed = times_as_fast(ours, theirs) if ours and theirs.library in PEERS else None
                if speed is not None and speed < 1.0:
                    peer = label(theirs, row.threads)
                    lines.append(f"- {row.name}: {speed:.2f} of the speed of {peer} ({source.file.name})")
    return "\n".join(lines) if lines else "In no row is it slower than a peer."


def _tables(source: Source) -> list[str]:
    parts = [f"### {source.file.name}", _origin(source), figures.machine_block(source.result.machine)]
    for suite in dict.fromkeys(row.suite for row in source.result.rows):
        cells = [cell for row in source.result.rows if row.suite == suite for cell in row_cells(row)]
        header, kept = without_empty_columns(ROW_HEADER, cells)
        lead = header.index("ours is") if "ours is" in header else None
        marked = [tuple(_marked(text, i == lead) for i, text in enumerate(row)) for row in kept]
        parts += [f"#### {suite}", figures.table(header, marked, left=2)]
    return parts


def _marked(text: str, is_lead: bool) -> str:
    """A ratio below one in bold: there the other is faster."""
    return f"**{text}**" if is_lead and text and float(text.removesuffix("x")) < 1.0 else text


def _origin(source: Source) -> str:
    return f"`{source.result.command}`; [{source.file.name}](../benches/results/{source.file.name})."


def _others(results: Path, link: str) -> list[str]:
    """What the scripts in benches/python measured, as far as their results are there."""
    known: tuple[tuple[str, Callable[[Path, str], str]], ...] = (
        ("trec.json", figures.trec),
        ("load_memory.json", figures.loading),
    )
    return [text(results / name, f"{link}/{name}") for name, text in known if (results / name).is_file()]


def readme_figures(found: Sequence[Source], results: Path) -> str:
    """The text between the markers of the README."""
    parts = []
    drawn = {chart.file: chart for chart in charts(found)}
    if "docs/linear.svg" in drawn:
        source = next(source for source in found if source.is_targets)
        caption = (
            "One linear layer with an NF4 weight, `linear MxNxK` without gradients, float32 activations: speed "
            "relative to torch's dense float32 product (the line at 1), every result checked. "
            f"{figures.conditions(source.result.machine)}. All rows, targets met and missed: [{PAGE}]({PAGE})."
        )
        parts += ["![Speed of a linear layer relative to dense torch](docs/linear.svg)", caption]
    parts += _others(results, "benches/results")
    parts += [
        figures.train_steps(source.result, source.file, f"benches/results/{source.file.name}")
        for source in found
        if any(row.suite == "train" for row in source.result.rows)
    ]
    return "\n\n".join(parts) + "\n"


def texts(root: Path, results: Path) -> dict[Path, str]:
    """What each generated text file has to hold."""
    found = sources(results)
    readme = root / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        root / PAGE: benchmarks(found, results),
        readme: before + BEGIN + readme_figures(found, results) + END + after,
    }


def stale(root: Path, results: Path) -> list[str]:
    """The generated files that are not what this would write."""
    wrong = [str(file) for file, text in texts(root, results).items() if _read(file) != text]
    return wrong + [
        str(root / chart.file) for chart in charts(sources(results)) if chart.key not in _read(root / chart.file)
    ]


def write(root: Path, results: Path) -> None:
    """Write every generated file."""
    for file, text in texts(root, results).items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    for chart in charts(sources(results)):
        plot_module.plot(chart.rows, root / chart.file, chart.key)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results")
    parser.add_argument("--root", type=Path, default=ROOT)
    arguments = parser.parse_args()
    if not arguments.check:
        write(arguments.root, arguments.results)
        return 0
    wrong = stale(arguments.root, arguments.results)
    print("\n".join(f"{file}: not what `python benches/report.py` writes" for file in wrong), file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
