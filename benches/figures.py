"""The parts that README.md and docs/BENCHMARKS.md have in common: text and tables from result files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ferrolora.bench.contender import OURS, PEFT
from ferrolora.bench.result import Result
from ferrolora.bench.row import Entry, Row, times_as_fast
from ferrolora.bench.table import duration, machine_lines


def conditions(machine: dict[str, Any]) -> str:
    """The machine of a run, in a few words."""
    load = machine["load_average"]
    busy = f", load average {load:.1f}" if load is not None and load > machine["threads"] else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['ferrolora_isa']}, "
        f"torch {machine['versions']['torch']}, {machine['date']}{busy}"
    )


def machine_block(machine: dict[str, Any]) -> str:
    """The whole header of a result."""
    return "\n".join(["```", *machine_lines(machine), "```"])


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, the first `left` columns to the left and the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def trec(file: Path, link: str) -> str:
    """The run of examples/trec.sh."""
    log = json.loads(file.read_text(encoding="utf-8"))
    memory, losses = log["base_memory"], [entry["loss"] for entry in log["history"] if "loss" in entry]
    linear = f"{mb(memory['linear_before'])} → {mb(memory['linear_after'])} ({memory['bits_per_parameter']:.3f} bits)"
    rows = [
        ("whole base in memory, float32 to NF4", f"{mb(memory['before'])} → {mb(memory['after'])}"),
        (f"its linear layers, {memory['linear_parameters'] / 1e6:.1f} M weights", linear),
        ("parameters trained", f"{log['trainable_parameters']:,}"),
        ("training loss, first and last ten steps", f"{losses[0]:.2f} → {losses[-1]:.2f}"),
        ("**accuracy on the test set**", f"**{log['metrics']['eval_accuracy']:.3f}**"),
        ("training time", f"{log['seconds']:.0f} s for {log['steps']} steps"),
    ]
    source = f"`{log['command']}`; {conditions(log['machine'])}; [{file.name}]({link})."
    return table(("TREC over MiniLM-L6, rank 16", ""), rows, left=2) + f"\n\n{source}"


def loading(file: Path, link: str) -> str:
    """Time and peak memory of loading a checkpoint, a line a way."""
    result = json.loads(file.read_text(encoding="utf-8"))
    names = {
        "float": "transformers, bfloat16",
        "ferrolora": "transformers + ferrolora, NF4",
        "bitsandbytes": "transformers + bitsandbytes, NF4",
    }
    rows = [
        (names[kind], f"{row['seconds']:.2f} s", *(mb(row[key]) for key in ("peak_bytes", "held_bytes", "model_bytes")))
        for kind, row in result["rows"].items()
    ]
    layers = result["model"]["num_hidden_layers"]
    about = (
        f"A Llama-shaped bfloat16 checkpoint of {layers} layers, {mb(result['rows']['float']['model_bytes'])} in "
        f"shards: median time of {result['rounds']} loads, and anonymous memory at its peak and afterwards; tensors "
        "that are not quantized stay in the mapped file."
    )
    source = f"`python benches/python/load_memory.py`; {conditions(result['machine'])}; [{file.name}]({link})."
    return table(("loading", "time", "peak memory", "held", "model"), rows) + f"\n\n{about} {source}"


def train_steps(result: Result, file: Path, link: str) -> str:
    """Time and memory of a train step, a line a model and type."""
    rows = [
        (f"{row.work}, {row.dtype}", _step(row.find(OURS)), _step(row.find(PEFT)), *_ratios(row))
        for row in result.rows
        if row.suite == "train"
    ]
    header = ("one train step", OURS, PEFT, "times as fast", "share of memory")
    about = "Median time of a step, and peak memory above the idle process."
    source = f"`{result.command}`; {conditions(result.machine)}; [{file.name}]({link})."
    return table(header, rows) + f"\n\n{about} {source}"


def _step(entry: Entry | None) -> str:
    if entry is None:
        return "not measured"
    if entry.median is None:
        return f"wrong: {entry.note}"
    return duration(entry.median) + ("" if entry.peak_bytes is None else f", {mb(entry.peak_bytes)}")


def _ratios(row: Row) -> tuple[str, str]:
    """How many times as fast as the peer, and the share of its peak memory; a loss is bold."""
    ours, theirs = row.find(OURS), row.find(PEFT)
    speed = times_as_fast(ours, theirs) if ours and theirs else None
    if ours is None or theirs is None or speed is None:
        return "", ""
    faster = f"{speed:.2f}x" if speed >= 1 else f"**{speed:.2f}x, slower**"
    if not ours.peak_bytes or not theirs.peak_bytes:
        return faster, ""
    share = ours.peak_bytes / theirs.peak_bytes
    return faster, f"{share:.2f}" if share <= 1 else f"**{share:.2f}, more**"


def mb(count: float) -> str:
    """Bytes in units of a million."""
    return f"{count / 1e6:.{1 if count >= 1e7 else 2}f} MB"
