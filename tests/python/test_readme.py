"""The README's Python runs as it stands, and its figures are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_quickstart_runs_to_its_last_assert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "\nassert " in block
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_figures_of_the_example_are_those_of_its_log() -> None:
    log = json.loads((ROOT / "benches/results/trec.json").read_text())
    memory = log["base_memory"]
    expected = [
        f"{log['metrics']['eval_accuracy']:.3f}",
        f"{memory['before'] / 1e6:.1f} MB",
        f"{memory['after'] / 1e6:.1f} MB",
        f"{memory['linear_before'] / 1e6:.1f} MB",
        f"{memory['linear_after'] / 1e6:.2f} MB",
        f"{memory['bits_per_parameter']:.3f} bits",
        f"{log['seconds']:.0f} s",
    ]
    figures = README.split("figures:begin")[1].split("figures:end")[0]
    assert [text for text in expected if text not in figures] == []


def test_the_figures_of_loading_are_those_of_the_benchmark() -> None:
    rows = json.loads((ROOT / "benches/results/load_memory.json").read_text())["rows"]
    figures = README.split("figures:begin")[1].split("figures:end")[0]
    for name in ("model_bytes", "peak_bytes"):
        assert f"{rows['nf4'][name] / 1e6:.1f} MB" in figures


def test_the_files_that_the_readme_names_are_there() -> None:
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"^sh (\S+)", README, flags=re.MULTILINE):
        assert (ROOT / name).exists(), name
