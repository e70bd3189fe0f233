"""benches/report.py writes page, charts and README figures from result files, and tells when they are stale."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrolora.bench.gpu.goals import works
from ferrolora.bench.gpu.row import GpuRow
from ferrolora.bench.gpu.row import result_json as gpu_result
from ferrolora.bench.result import result_json
from tiny.rows import MACHINE, ROWS

BENCHES = Path(__file__).parents[3] / "benches"
COMMAND = "ferrolora bench --suite targets --threads 2 --rounds 3 --json bench-targets.json"


@pytest.fixture
def report(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`report("--check")` runs the script over `root` and gives its exit status."""
    monkeypatch.syspath_prepend(str(BENCHES))
    script = importlib.import_module("report")

    def run(*options: str) -> int:
        folders = ["--root", str(root), "--results", str(root / "results")]
        monkeypatch.setattr(sys, "argv", ["report.py", *folders, *options])
        status: int = script.main()
        return status

    return run


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A README with markers and one result."""
    (tmp_path / "results").mkdir()
    result = result_json(MACHINE, COMMAND, ROWS)
    (tmp_path / "results" / "bench-targets.json").write_text(json.dumps(result))
    (tmp_path / "README.md").write_text("before\n<!-- figures:begin -->\nold\n<!-- figures:end -->\nafter\n")
    return tmp_path


def test_the_page_has_caveats_then_targets_then_losses_then_tables_then_commands(
    root: Path, report: Callable[..., int]
) -> None:
    assert report() == 0
    page = (root / "docs/BENCHMARKS.md").read_text()
    parts = [line for line in page.splitlines() if line.startswith("## ")]
    assert parts == [
        "## Caveats",
        "## Targets",
        "## Where ferrolora loses",
        "## All rows",
        "## Other measurements",
        "## NVIDIA GPUs",
        "## Commands",
    ]
    assert "| linear 16x4096x4096 float32 | torch dense | ≥ 1.6x | 2.00x | pass |" in page
    assert "| linear 16x4096x4096 float32, scaling | 1 thread | ≥ 1.8x | 1.50x | **miss** |" in page
    assert "| quantize 4096x4096 float32 | bitsandbytes | ≥ 60x |  | not measured |" in page
    assert "- lora 512x4096x4096 float32: 0.95 of the speed of torch dense (bench-targets.json)" in page
    assert "| **0.95x** |" in page
    assert "WRONG: y: 3 of 8 values outside the bound" in page
    assert page.count(COMMAND) == 3  # at the targets, at the tables, at the end
    assert "Test CPU, 2 cores; 2 threads, 2026-11-21" in page


def test_the_readme_gets_chart_and_train_steps_between_its_markers(root: Path, report: Callable[..., int]) -> None:
    assert report() == 0
    readme = (root / "README.md").read_text()
    assert readme.startswith("before\n<!-- figures:begin -->\n![Speed of a linear layer")
    assert readme.endswith("<!-- figures:end -->\nafter\n")
    assert "| llama-512, float32 | 100 ms, 100.0 MB | 250 ms, 200.0 MB | 2.50x | 0.50 |" in readme
    assert (root / "docs/linear.svg").is_file()
    assert (root / "docs/train.svg").is_file()


def test_check_names_what_is_stale_and_writes_nothing(
    root: Path, report: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert report("--check") == 1
    assert not (root / "docs").exists()
    assert report() == 0
    capsys.readouterr()
    assert report("--check") == 0
    assert not capsys.readouterr().err.strip()
    file = root / "results" / "bench-targets.json"
    file.write_text(file.read_text().replace("0.002", "0.003"))
    assert report("--check") == 1
    told = capsys.readouterr().err
    for name in ("BENCHMARKS.md", "linear.svg"):
        assert f"{name}: not what `python benches/report.py` writes" in told
    assert "train.svg" not in told


def test_the_page_says_that_no_gpu_was_measured_until_one_was(root: Path, report: Callable[..., int]) -> None:
    report()
    page = (root / "docs/BENCHMARKS.md").read_text()
    assert "no kernel of ours has run on a GPU" in page
    assert "| few rows, NF4 | bitsandbytes | ≥ 0.95x | 24 |" in page
    assert "python tests/gpu/run.py dist/ferrolora-*.whl" in page

    rows = [GpuRow(work, "s", {"ferrolora": 1e-3, "bitsandbytes": 1.1e-3}) for work in works()]
    content = {
        "date": "2026-01-02",
        "wheel": "ferrolora-0.1.0.whl",
        "doctor": {"versions": {"torch": "2.15.0"}},
        "tests": {"passed": 112, "failed": 0, "skipped": 1, "failures": []},
        "bench": gpu_result(MACHINE, "GPU A", "ferrolora bench --suite gpu", rows),
    }
    (root / "results" / "gpu-a.json").write_text(json.dumps(content))
    assert report("--check") == 1
    report()
    page = (root / "docs/BENCHMARKS.md").read_text()
    assert "no kernel of ours has run on a GPU" not in page
    assert "### GPU A, 2026-01-02" in page
    assert "112 tests passed, 0 failed, 1 were skipped" in page
    assert "| linear 2x4096x4096 (q, o) | 1.00 ms | bitsandbytes | ≥ 0.95x | 1.10x | pass |" in page
    assert "| linear, m = 2 to 64, geometric mean |  | bitsandbytes | ≥ 1.2x | 1.10x | **miss** |" in page
    assert report("--check") == 0
