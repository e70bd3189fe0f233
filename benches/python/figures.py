"""Write the figures of README.md from the committed results, so that no number is typed by hand.

    python benches/python/figures.py [--check]

With --check nothing is written; the exit status is 1 if the README does not hold these figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benches" / "results"
BEGIN, END = "<!-- figures:begin -->\n", "<!-- figures:end -->"


def conditions(machine: dict[str, Any]) -> str:
    """The machine of a run, in a few words."""
    versions = machine["versions"]
    busy = f", load average {machine['load_average']:.1f}" if machine["load_average"] > machine["threads"] else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['ferrolora_isa']}, torch {versions['torch']}, "
        f"{machine['date']}{busy}"
    )


def trec(log: dict[str, Any]) -> str:
    memory, losses = log["base_memory"], [entry["loss"] for entry in log["history"] if "loss" in entry]
    rows = [
        ("whole base in memory, float32 to NF4", f"{mb(memory['before'])} → {mb(memory['after'])}"),
        (
            f"its linear layers, {memory['linear_parameters'] / 1e6:.1f} M weights",
            f"{mb(memory['linear_before'])} → {mb(memory['linear_after'])} ({memory['bits_per_parameter']:.3f} bits)",
        ),
        ("parameters trained", f"{log['trainable_parameters']:,}"),
        ("training loss, first and last ten steps", f"{losses[0]:.2f} → {losses[-1]:.2f}"),
        ("**accuracy on the test set**", f"**{log['metrics']['eval_accuracy']:.3f}**"),
        ("training time", f"{log['seconds']:.0f} s for {log['steps']} steps"),
    ]
    lines = ["| TREC over MiniLM-L6, rank 16 | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    source = f"`{log['command']}`; {conditions(log['machine'])}; [trec.json](benches/results/trec.json)."
    return "\n".join([*lines, "", source])


def loading(result: dict[str, Any]) -> str:
    row = result["rows"]["nf4"]
    source = "`python benches/python/load_memory.py`; [load_memory.json](benches/results/load_memory.json)"
    return (
        f"Loading a float32 model of {mb(result['rows']['float']['model_bytes'])} as NF4 ({mb(row['model_bytes'])}) "
        f"takes {mb(row['peak_bytes'])} of memory at its peak and {mb(row['held_bytes'])} afterwards; "
        f"the rest of the model is the file itself, mapped. {source}."
    )


def train_step(result: dict[str, Any], file: Path) -> str:
    lines = ["| one train step | ferrolora | PEFT + bitsandbytes |", "|---|---|---|"]
    for name, row in result["rows"].items():
        lines.append(f"| {name} | {entry(row['ferrolora'])} | {entry(row['bitsandbytes'])} |")
    source = f"`python benches/python/train_step.py`; {conditions(result)}; [{file.name}](benches/results/{file.name})."
    return "\n".join([*lines, "", f"Median time, and peak memory above the model at rest. {source}"])


def entry(row: dict[str, Any]) -> str:
    if "died" in row:
        return "dies"
    if not row["right"]:
        return f"wrong gradients, off by {row['gradient_error']:.2g}"
    return f"{row['median_seconds'] * 1e3:.0f} ms, {mb(row['step_peak_bytes'])}"


def mb(count: float) -> str:
    return f"{count / 1e6:.{1 if count >= 1e7 else 2}f} MB"


def figures() -> str:
    """The text between the markers."""
    parts = [trec(json.loads((RESULTS / "trec.json").read_text()))]
    parts.append(loading(json.loads((RESULTS / "load_memory.json").read_text())))
    steps = sorted(RESULTS.glob("train_step-*.json"))
    if steps:
        parts.append(train_step(json.loads(steps[-1].read_text()), steps[-1]))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    current = before + BEGIN + figures() + END + after
    if parser.parse_args().check:
        return int(current != text)
    readme.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
