"""Rows: ratios, JSON, text and targets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ferrolora.bench.contender import BITSANDBYTES, COPY, FRESH, OURS, PEFT, TORCH
from ferrolora.bench.plot import bars, plot
from ferrolora.bench.result import read_result, result_json
from ferrolora.bench.row import Entry, Row, times_as_fast
from ferrolora.bench.suites.registry import SUITES
from ferrolora.bench.table import ROW_HEADER, duration, row_cells, target_cells
from ferrolora.bench.targets import OPEN, column, column_names, judge, target_plan, targets
from ferrolora.errors import FormatError
from tiny.rows import DEQUANTIZE, LINEAR, LORA, MACHINE, ROWS, TRAIN


def found(row: Row, library: str, **which: Any) -> Entry:
    entry = row.find(library, **which)
    assert entry is not None
    return entry


def test_the_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    slow = Entry(TORCH, True, seconds=(2.0, 40.0, 6.0))
    fast = Entry(OURS, True, seconds=(1.0, 10.0, 4.0))
    assert times_as_fast(fast, slow) == 2.0  # of 2, 4 and 1.5
    assert times_as_fast(fast, Entry(TORCH, False)) is None


def test_a_reused_output_is_held_against_a_reused_ceiling() -> None:
    assert DEQUANTIZE.ceiling_of(found(DEQUANTIZE, OURS)) is found(DEQUANTIZE, COPY)
    fresh = found(DEQUANTIZE, OURS, output=FRESH)
    assert DEQUANTIZE.ceiling_of(fresh) is found(DEQUANTIZE, COPY, output=FRESH)
    assert LINEAR.ceiling_of(found(LINEAR, OURS, threads=1)) is None
    assert TRAIN.ceiling_of(found(TRAIN, OURS)) is None


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result_json(MACHINE, "ferrolora bench", ROWS)))
    assert read_result(file) == (MACHINE, "ferrolora bench", ROWS)


@pytest.mark.parametrize("text", ["{", "{}", '{"machine": {}, "command": "", "rows": [{"suite": "x"}]}', "[]"])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(FormatError, match=r"bad\.json: no result of ferrolora bench"):
        read_result(tmp_path / "bad.json")


def test_a_wrong_entry_has_blanks_in_place_of_its_figures_and_says_why() -> None:
    ours, single, wrong, torch = (dict(zip(ROW_HEADER, cells, strict=True)) for cells in row_cells(LINEAR))
    assert (ours["time"], ours["quartiles"]) == ("2.00 ms", "2.00 ms to 3.00 ms")
    assert (ours["GB/s"], ours["GFLOP/s"], ours["of ceiling"], ours["ours is"]) == ("5.00", "500", "2.00", "")
    assert single["library"] == "ferrolora (1 thread)"
    assert (torch["of ceiling"], torch["ours is"]) == ("1.00", "2.00x")
    blanks = {name: wrong[name] for name in ("time", "quartiles", "GB/s", "GFLOP/s", "of ceiling", "ours is")}
    assert set(blanks.values()) == {""}
    assert wrong["remark"] == "WRONG: y: 3 of 8 values outside the bound"


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5e-6, "2.50 µs"), (9.99e-4, "999 µs"), (0.0123, "12.3 ms"), (1.5, "1.50 s")]
)
def test_a_duration_has_its_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_targets_are_decided_row_by_row() -> None:
    judged = {(line.target.name, line.target.against): line for line in judge(ROWS, MACHINE)}
    linear = judged["linear 16x4096x4096 float32", TORCH]
    assert (linear.ratio, linear.verdict, linear.target.goal) == (2.0, "pass", "≥ 1.6x")
    assert judged["linear 16x4096x4096 float32", BITSANDBYTES].verdict == OPEN  # it was wrong
    scaling = judged["linear 16x4096x4096 float32, scaling", "1 thread"]
    assert (scaling.ratio, scaling.verdict) == (1.5, "miss")
    copy = judged["dequantize 4096x4096 float32", COPY]
    assert (copy.ratio, copy.verdict) == (0.75, "miss")
    memory = judged["lora 512x4096x4096 float32, peak memory", PEFT]
    assert (memory.ratio, memory.verdict, memory.target.goal) == (0.4, "pass", "≤ 0.5x")
    assert judged["lora 512x4096x4096 float32", TORCH].verdict == "pass"  # 0.95 of 0.9
    assert judged["quantize 4096x4096 float32", BITSANDBYTES].verdict == OPEN
    assert ("linear 16x4096x4096 float32", TORCH, "≥ 1.6x", "2.00x", "pass") in target_cells(list(judged.values()))


def test_on_other_threads_than_the_tables_no_target_is_decided() -> None:
    verdicts = {line.verdict for line in judge(ROWS, {**MACHINE, "threads": 4})}
    assert verdicts == {"-", OPEN}


def test_the_column_goes_by_the_instruction_sets() -> None:
    assert column(MACHINE) == "B"
    assert column({**MACHINE, "instruction_sets": ["avx2", "avx512f"]}) == "A"
    assert column({**MACHINE, "ferrolora_isa": "avx512bf16"}) == "B16"
    limits = {
        host: {(t.suite, t.work, t.dtype, t.against): t.limit for t in targets(host) if t.measure == "speed"}
        for host in column_names()
    }
    narrow = ("linear", "512x4096x4096", "bfloat16", TORCH)
    assert [limits[host][narrow] for host in ("A", "B", "B16")] == [3, 1.6, 2.5]
    one = ("linear", "1x4096x4096", "float32", TORCH)
    assert [limits[host][one] for host in ("A", "B", "B16")] == [5, 3.5, 3.5]


def test_the_plan_of_the_targets_measures_each_of_them_once() -> None:
    planned = [(work.suite, work.problem.work, work.problem.dtype) for work in target_plan()]
    assert len(planned) == len(set(planned))
    assert set(planned) == {(target.suite, target.work, target.dtype) for target in targets("B")}
    assert {suite for suite, _, _ in planned} <= set(SUITES)


def test_bars_stand_relative_to_the_ceiling_or_the_peer() -> None:
    assert [(bar.name, bar.speed) for bar in bars(LINEAR)] == [("ferrolora", 2.0)]
    assert [(bar.name, bar.speed) for bar in bars(TRAIN)] == [("ferrolora", 2.5)]
    assert [bar.name for bar in bars(DEQUANTIZE)] == ["ferrolora (reused output)", "ferrolora"]
    assert bars(replace(TRAIN, entries=TRAIN.entries[:1])) == []


def test_the_same_rows_draw_the_same_file(tmp_path: Path) -> None:
    alone = replace(TRAIN, entries=TRAIN.entries[:1])
    for name in ("a.svg", "b.svg", "c.png"):
        plot([LINEAR, LORA, alone], tmp_path / name, "what it shows")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "what it shows" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
