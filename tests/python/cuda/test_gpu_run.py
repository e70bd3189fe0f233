"""tests/gpu/run.py from the command line to the file it writes, over a wheel and tests that stand for the real ones."""

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "gpu" / "run.py"
DOCTOR: dict[str, Any] = {
    "missing": ["matplotlib is not installed"],  # which neither tests nor benchmark need
    "gpu": {"devices": [{"name": "NVIDIA H200 (fake)"}], "missing": []},
    "compiler": {"missing": []},
}
PACKAGE = """
import json, pathlib, sys
command, *rest = sys.argv[1:]
if command == "doctor":
    print(json.dumps({doctor}))
else:
    pathlib.Path(rest[rest.index("--json") + 1]).write_text(json.dumps({{"rows": [], "goals": []}}))
    print("last words")
    sys.exit({status})
"""
PASSES = "def test_fine():\n    assert True\n"
FAILS = "def test_wrong():\n    assert 1 == 2\n"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, over a checkout with one GPU test that passes."""
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "today", lambda: "2026-01-02")
    write_tests(tmp_path, PASSES)
    return module


def write_tests(root: Path, text: str) -> None:
    folder = root / "tests/python/gpu"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_it.py").write_text(text)


def wheel(root: Path, doctor: dict[str, Any] = DOCTOR, status: int = 0) -> str:
    file = root / "ferrolora-0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("ferrolora/__init__.py", "")
        archive.writestr("ferrolora/__main__.py", PACKAGE.format(doctor=doctor, status=status))
    return str(file)


def result(root: Path) -> Any:
    return json.loads((root / "2026-01-02-nvidia-h200-fake.json").read_text())


def test_a_run_that_passes_writes_all_it_found(script: Any, tmp_path: Path) -> None:
    assert script.main([wheel(tmp_path), "--output", str(tmp_path)]) == 0
    found = result(tmp_path)
    assert found["date"] == "2026-01-02"
    assert found["wheel"] == "ferrolora-0-py3-none-any.whl"
    assert found["doctor"] == DOCTOR
    assert found["tests"] == {"passed": 1, "failed": 0, "skipped": 0, "failures": []}
    assert found["bench"] == {"rows": [], "goals": []}


def test_a_test_that_fails_is_named_and_fails_the_run(script: Any, tmp_path: Path) -> None:
    write_tests(tmp_path, PASSES + "\n\n" + FAILS)
    assert script.main([wheel(tmp_path), "--output", str(tmp_path), "--tests-only"]) == 1
    found = result(tmp_path)
    assert (found["tests"]["passed"], found["tests"]["failed"]) == (1, 1)
    assert found["tests"]["failures"][0]["test"].endswith("test_it.test_wrong")
    assert "assert 1 == 2" in found["tests"]["failures"][0]["message"]
    assert "bench" not in found


def test_tests_that_were_all_skipped_or_did_not_start_fail_the_run(script: Any, tmp_path: Path) -> None:
    write_tests(tmp_path, "import pytest\n\n\n@pytest.mark.skip\ndef test_fine():\n    pass\n")
    assert script.main([wheel(tmp_path), "--output", str(tmp_path), "--tests-only"]) == 1
    assert result(tmp_path)["tests"]["skipped"] == 1
    write_tests(tmp_path, "import a_module_that_nobody_has\n")
    assert script.main([wheel(tmp_path), "--output", str(tmp_path), "--tests-only"]) == 1
    assert "a_module_that_nobody_has" in json.dumps(result(tmp_path)["tests"])


def test_a_benchmark_that_fails_keeps_tests_and_rows(script: Any, tmp_path: Path) -> None:
    assert script.main([wheel(tmp_path, status=1), "--output", str(tmp_path)]) == 1
    found = result(tmp_path)
    assert found["tests"]["passed"] == 1
    assert found["bench"] == {"rows": [], "goals": [], "error": "the benchmark failed, status 1: last words"}


@pytest.mark.parametrize(
    ("doctor", "says"),
    [
        ({**DOCTOR, "compiler": {"missing": ["cuda-core is not installed"]}}, "cuda-core is not installed"),
        ({**DOCTOR, "gpu": {"devices": [], "missing": ["no NVIDIA driver"]}}, "no NVIDIA driver"),
    ],
)
def test_a_machine_that_cannot_run_it_is_told_what_is_missing(
    script: Any, tmp_path: Path, doctor: dict[str, Any], says: str
) -> None:
    with pytest.raises(SystemExit, match=f"this machine cannot run it:\n{says}"):
        script.main([wheel(tmp_path, doctor), "--output", str(tmp_path)])
    assert not list(tmp_path.glob("*.json"))


def test_wrong_arguments_end_it_before_anything_runs(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, says in (
        ([str(tmp_path / "absent.whl")], "absent.whl is not a wheel"),
        ([wheel(tmp_path), "--output", str(tmp_path / "absent")], "absent is not a folder"),
        ([], "the following arguments are required: wheel"),
    ):
        with pytest.raises(SystemExit) as ended:
            script.main(arguments)
        assert ended.value.code == 2
        assert says in capsys.readouterr().err
