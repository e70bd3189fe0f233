"""Check and measure a wheel on a machine with a GPU: no Rust, no network, nothing installed outside a temporary folder.

    python tests/gpu/run.py ferrolora-….whl [--tests-only] [--output DIRECTORY]

Needs in the Python that runs it: torch with CUDA, cuda-core, pytest, pytest-timeout, and ferrolora's own dependencies.
Prints what fails, writes `<date>-<gpu>.json` (doctor, tests, benchmark rows), and exits with status 1 if a test failed.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run everything.

    Returns: the exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--tests-only", action="store_true", help="leave the benchmark out")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the result; default: the current one")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(arguments.wheel) as wheel:
            wheel.extractall(folder)  # a wheel is a zip of what goes on the path
        environment = {**os.environ, "PYTHONPATH": folder}
        doctor = json.loads(run(["-m", "ferrolora", "doctor", "--json"], environment).stdout)
        result: dict[str, Any] = {"wheel": arguments.wheel.name, "doctor": doctor}
        if not doctor["gpu"]["devices"] or doctor["missing"]:
            sys.exit("this machine cannot run it:\n" + "\n".join(doctor["missing"] or doctor["gpu"]["missing"]))
        result["tests"] = test(environment, Path(folder) / "report.xml")
        if not arguments.tests_only:
            result["bench"] = bench(environment, Path(folder) / "bench.json")
    name = re.sub(r"[^a-z0-9]+", "-", doctor["gpu"]["devices"][0]["name"].lower()).strip("-")
    file = arguments.output / f"{datetime.date.today().isoformat()}-{name}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    counts = result["tests"]
    print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped; {file}")
    return 1 if counts["failed"] or not counts["passed"] else 0


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A command of this Python at the root of the checkout; its output is kept, a failure shown."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, check=False, stdout=subprocess.PIPE, text=True
    )
    if done.returncode and command[:2] != ["-m", "pytest"]:
        sys.exit(f"python {' '.join(command)} failed:\n{done.stdout}")
    return done


def test(environment: dict[str, str], report: Path) -> dict[str, Any]:
    """Counts, and the name and message of each test that failed."""
    options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    done = run(["-m", "pytest", *options, "tests/python/gpu"], environment)
    print(done.stdout)
    if not report.is_file():
        sys.exit("pytest did not finish")
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    failed = [
        {"test": f"{case.get('classname')}.{case.get('name')}", "message": problem.get("message")}
        for case in suite.iter("testcase")
        for problem in (*case.findall("failure"), *case.findall("error"))
    ]
    skipped = int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - len(failed) - skipped
    return {"passed": passed, "failed": len(failed), "skipped": skipped, "failures": failed}


def bench(environment: dict[str, str], file: Path) -> Any:
    """The rows of `ferrolora bench --suite gpu`."""
    print(run(["-m", "ferrolora", "bench", "--suite", "gpu", "--json", str(file)], environment).stdout)
    return json.loads(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
