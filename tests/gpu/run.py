"""Check and measure a wheel on a machine with a GPU: no Rust, no network, nothing installed outside a temporary folder.

    python tests/gpu/run.py ferrolora-….whl [--tests-only] [--output DIRECTORY]

Needs in the Python that runs it: torch with CUDA, cuda-core, pytest, pytest-timeout, and ferrolora's own dependencies.
Prints what fails, writes `<date>-<gpu>.json` (doctor, tests, benchmark rows), and exits with status 1 if a test or the
benchmark failed. The machine needs this file, pyproject.toml, and of tests/: python/{gpu,conftest.py}, tables, tiny.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything. What was found is written even where a later part fails.

    Args:
        arguments: of the command line. Default: those of this process.

    Returns: the exit status.
    """
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(options.wheel) as wheel:
            wheel.extractall(folder)  # a wheel is a zip of what goes on the path
        environment = {**os.environ, "PYTHONPATH": folder}
        doctor = examine(environment)
        result: dict[str, Any] = {"date": today(), "wheel": options.wheel.name, "doctor": doctor}
        result["tests"] = test(environment, Path(folder) / "report.xml")
        if not options.tests_only:
            result["bench"] = bench(environment, Path(folder) / "bench.json")
    name = re.sub(r"[^a-z0-9]+", "-", doctor["gpu"]["devices"][0]["name"].lower()).strip("-")
    file = options.output / f"{today()}-{name}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    counts, failed = result["tests"], result.get("bench", {}).get("error")
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; {file}")
    for problem in filter(None, (counts.get("error"), failed)):
        print(problem)
    return int(bool(counts["failed"] or not counts["passed"] or counts.get("error") or failed))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a wheel or a folder that is not there ends the process before anything runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--tests-only", action="store_true", help="leave the benchmark out")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the result; default: the current one")
    options = parser.parse_args(arguments)
    if not zipfile.is_zipfile(options.wheel):
        parser.error(f"{options.wheel} is not a wheel")
    if not options.output.is_dir():
        parser.error(f"--output {options.output} is not a folder")
    return options


def today() -> str:
    """The date, as results have it."""
    return datetime.date.today().isoformat()


def examine(environment: dict[str, str]) -> Any:
    """What `ferrolora doctor` finds; ends the process where the kernels cannot run or the tests have no pytest."""
    done = run(["-m", "ferrolora", "doctor", "--json"], environment)
    if done.returncode:
        sys.exit(f"the wheel does not run here:\n{done.stdout}")
    doctor = json.loads(done.stdout)
    missing = doctor["gpu"]["missing"] + doctor["compiler"]["missing"]  # not what only other commands need
    missing += [f"{name} is not installed" for name in ("pytest", "pytest_timeout") if find_spec(name) is None]
    if missing:
        sys.exit("this machine cannot run it:\n" + "\n".join(missing))
    return doctor


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command of this Python at the root of the checkout; its output is kept, its errors are shown."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=False, stdout=subprocess.PIPE, text=True
    )


def test(environment: dict[str, str], report: Path) -> dict[str, Any]:
    """Counts, the name and message of each test that failed, and an error if pytest itself did not finish."""
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = run(["-m", "pytest", *options, "tests/python/gpu"], environment)
    print(done.stdout)
    if not report.is_file():
        error = f"pytest did not finish, status {done.returncode}: {last_line(done.stdout)}"
        return {"passed": 0, "failed": 0, "skipped": 0, "failures": [], "error": error}
    return counts(report)


def counts(report: Path) -> dict[str, Any]:
    """What a JUnit file of pytest says."""
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    failures = [
        {
            "test": f"{case.get('classname')}.{case.get('name')}",
            "message": problem.get("message"),
            "traceback": (problem.text or "")[-4000:],
        }
        for case in suite.iter("testcase")
        for problem in (*case.findall("failure"), *case.findall("error"))
    ]
    failed, skipped = len({failure["test"] for failure in failures}), int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - failed - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped, "failures": failures}


def bench(environment: dict[str, str], file: Path) -> Any:
    """The result of `ferrolora bench --suite gpu`, with an error if the command failed."""
    done = run(["-m", "ferrolora", "bench", "--suite", "gpu", "--json", str(file)], environment)
    print(done.stdout)
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if done.returncode:
        result["error"] = f"the benchmark failed, status {done.returncode}: {last_line(done.stdout)}"
    return result


def last_line(text: str) -> str:
    """Of an output, or nothing."""
    return (text.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    sys.exit(main())
