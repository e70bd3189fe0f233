"""The README's Python runs as it stands, and its figures are those of the committed results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_quickstart_runs_to_its_last_assert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert "\nassert " in block
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_the_figures_are_those_of_the_committed_results() -> None:
    check = subprocess.run([sys.executable, ROOT / "benches/report.py", "--check"], check=False)
    assert check.returncode == 0, "python benches/report.py writes them"


def test_the_files_that_the_readme_names_are_there() -> None:
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"^sh (\S+)", README, flags=re.MULTILINE):
        assert (ROOT / name).exists(), name
