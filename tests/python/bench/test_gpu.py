"""The GPU suite without a GPU: its table, its judgement, its files, and those of its parts that run anywhere."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ferrolora.bench.gpu import layer, peers, suite, train
from ferrolora.bench.gpu.goals import (
    ABOUT,
    BITSANDBYTES,
    CEILING,
    DENSE,
    IDEAL,
    OURS,
    PEFT,
    TILE_ROWS,
    UNSLOTH,
    Goal,
    Work,
    works,
)
from ferrolora.bench.gpu.operands import branch, normal, relative_error
from ferrolora.bench.gpu.row import HEADER, GpuRow, geometric_mean, judge, read_rows, result_json
from ferrolora.cli import bench
from ferrolora.errors import FerroloraError
from ferrolora.ops.linear import linear
from ferrolora.ops.quantize import quantize

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 32,
}


def group(name: str) -> list[Work]:
    return [work for work in works() if work.group == name]


def test_every_row_of_the_table_of_targets_is_planned() -> None:
    assert {(work.m, work.n, work.k) for work in group("gemv")} == {
        (1, 4096, 4096),
        (1, 1024, 4096),
        (1, 14336, 4096),
        (1, 4096, 14336),
    }
    assert sorted({work.m for work in group("gemm")}) == list(TILE_ROWS) == [2, 4, 8, 16, 32, 64]
    assert len(group("gemm")) == 4 * len(TILE_ROWS)
    assert all(work.goals == (Goal(PEFT, 1.4), Goal(UNSLOTH, 1.05), Goal(DENSE, 0.88)) for work in group("step"))
    assert {work.m for work in group("step")} == {4096}
    assert all(work.goals == (Goal(IDEAL, 1.05, at_most=True),) for work in group("saved"))
    assert [work.goals for work in group("host")] == [(Goal(DENSE, 2.0, at_most=True),)]
    assert [work.goals for work in group("train")] == [(Goal(PEFT, 1.3),)]
    assert [work.goals for work in group("train-memory")] == [(Goal(PEFT, 0.8, at_most=True),)]
    assert len({work.name for work in works()}) == len(works())
    assert {work.group for work in works()} == set(ABOUT)
    assert {work.group for work in works()} == {*suite.MEASURES, "train", "train-memory"}
    assert works()[-1].group == "step"


def test_a_goal_compares_the_right_way_round() -> None:
    faster, share = Goal(BITSANDBYTES, 1.25), Goal(PEFT, 0.8, at_most=True)
    assert faster.ratio(ours=2.0, theirs=3.0) == 1.5
    assert (faster.is_met(1.25), faster.is_met(1.24)) == (True, False)
    assert share.ratio(ours=2.0, theirs=4.0) == 0.5
    assert (share.is_met(0.8), share.is_met(0.81)) == (True, False)
    assert (str(faster), str(share)) == ("≥ 1.25x", "≤ 0.8x")


def test_the_geometric_mean_is_that_of_its_definition() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([3.0]) == pytest.approx(3.0)
    assert geometric_mean([1.1, 1.2, 1.3]) == pytest.approx((1.1 * 1.2 * 1.3) ** (1 / 3))
    with pytest.raises(ValueError, match="at least one"):
        geometric_mean([])


def measured(theirs: float) -> list[GpuRow]:
    """A run in which every peer needs `theirs` seconds, or bytes, to our one."""
    names = (CEILING, BITSANDBYTES, PEFT, DENSE, IDEAL)
    missing = {UNSLOTH: "not installed"}
    return [GpuRow(work, "s", {OURS: 1.0, **dict.fromkeys(names, theirs)}, 0.0, missing) for work in works()]


def test_rows_and_means_are_judged() -> None:
    lines = judge(measured(1.3))
    assert {line.verdict for line in lines if line.goal.against == UNSLOTH} == {"not measured"}
    assert {line.note for line in lines if line.goal.against == UNSLOTH} == {"not installed"}
    missed = {line.name for line in lines if line.verdict == "miss"}
    assert missed == {work.name for work in group("step")}  # 1.3 is under 1.4 of PEFT
    assert lines[-1].name == "linear, m = 2 to 64, geometric mean"
    assert lines[-1].ratio == pytest.approx(1.3)
    assert lines[-1].verdict == "pass"
    assert judge(measured(1.1))[-1].verdict == "miss"


def test_one_row_under_the_least_misses_although_the_mean_passes() -> None:
    rows = measured(1.5)
    place = next(i for i, row in enumerate(rows) if row.work.group == "gemm")
    rows[place].values[BITSANDBYTES] = 0.9
    lines = {line.name: line for line in judge(rows)}
    assert lines[rows[place].work.name].verdict == "miss"
    assert lines["linear, m = 2 to 64, geometric mean"].verdict == "pass"


def test_a_mean_over_a_part_of_its_rows_is_not_judged() -> None:
    rows = measured(1.5)
    del next(row for row in rows if row.work.group == "gemm").values[BITSANDBYTES]
    line = judge(rows)[-1]
    assert (line.ratio, line.verdict, line.note) == (None, "not measured", "23 of 24 rows measured")


def test_a_result_is_json_that_can_be_read_and_judged_again() -> None:
    rows = measured(1.3)
    content = json.loads(json.dumps(result_json({"date": "2026-01-01"}, "GPU A", "ferrolora bench", rows)))
    assert set(content) == {"machine", "gpu", "command", "rows", "goals"}
    again = read_rows(content)
    assert again == rows
    assert [line.to_json() for line in judge(again)] == content["goals"]
    (step,) = [row for row in content["rows"] if row["group"] == "train"]
    assert step["tokens_per_second"][OURS] == 2048.0
    assert all(len(line.cells()) == len(HEADER) for line in judge(again))


def test_what_fails_is_a_row_that_says_why() -> None:
    work = group("gemv")[0]

    def broken(work: Work) -> GpuRow:
        raise RuntimeError("no kernel image\nmore lines")

    row = suite.measured(work, broken)
    assert suite.failures([row]) == [f"{work.name}: failed: RuntimeError: no kernel image"]
    assert {line.verdict for line in judge([row])[:2]} == {"not measured"}
    assert {line.note for line in judge([row])[:2]} == {"failed: RuntimeError: no kernel image"}
    assert json.loads(json.dumps(row.to_json()))["values"] == {}


def test_a_peer_that_is_absent_or_fails_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, Any] = {}
    notes: dict[str, str] = {}
    monkeypatch.setitem(peers.NEEDS, UNSLOTH, ("a_package_that_nobody_has",))
    peers.add_peer(UNSLOTH, lambda: [print], calls, notes)
    monkeypatch.setitem(peers.NEEDS, PEFT, ())
    peers.add_peer(PEFT, lambda: [lambda: 1 / 0], calls, notes)
    monkeypatch.setitem(peers.NEEDS, BITSANDBYTES, ())
    works_here: list[Any] = [lambda: None]
    peers.add_peer(BITSANDBYTES, lambda: works_here, calls, notes)
    assert notes == {UNSLOTH: "not installed", PEFT: "failed: ZeroDivisionError: division by zero"}
    assert calls == {BITSANDBYTES: works_here}


def test_what_a_layer_saves_is_within_its_goal_on_any_device() -> None:
    row = layer.measure_saved(Work("saved", "saved", 32, 128, 256, (Goal(IDEAL, 1.05, at_most=True),)), "cpu")
    assert row.values[IDEAL] == 2 * 32 * (256 + 16)
    assert judge([row])[0].verdict == "pass"
    assert math.isclose(row.values[OURS], row.values[IDEAL])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("library", [OURS, PEFT])
def test_a_small_model_trains_as_the_large_one_would(library: str) -> None:
    for package in peers.NEEDS.get(library, ()):
        pytest.importorskip(package)
    step = train.stepper(library, train.model(SMALL, "cpu", tokens=16), "cpu")
    losses = [float(step()) for _ in range(6)]
    assert losses[-1] < losses[0]


def test_the_peers_step_computes_the_same_gradients_as_ours() -> None:
    for package in peers.NEEDS[PEFT]:
        pytest.importorskip(package)
    weight, lora, dy, x = normal(64, 128, "cpu"), branch(64, 128, "cpu"), normal(8, 64, "cpu"), normal(8, 128, "cpu")
    own, theirs = (x.clone().requires_grad_() for _ in range(2))
    linear(own, quantize(weight), lora=lora).backward(dy)
    peers.peft_step(theirs, weight, lora, dy)[0]()
    assert own.grad is not None
    assert theirs.grad is not None
    relative_error("gradient of x", own.grad, theirs.grad)


def test_the_command_writes_its_result_also_when_a_row_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = GpuRow(works()[-1], "s", {}, notes={OURS: "failed: RuntimeError: no kernel image"})
    monkeypatch.setattr(suite, "rows", lambda: iter([*measured(1.3)[:-1], broken]))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "GPU A")
    file = tmp_path / "gpu.json"
    with pytest.raises(FerroloraError, match=f"not measured: {re.escape(works()[-1].name)}: failed: RuntimeError"):
        bench.measure_gpu("gpu", False, file)
    content = json.loads(file.read_text())
    assert (content["gpu"], len(content["rows"])) == ("GPU A", len(works()))
    assert content["command"] == "ferrolora bench --suite gpu --json gpu.json"
