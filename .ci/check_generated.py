"""Check that each constant has one definition and that generated files are what their generators give now.

python .ci/check_generated.py        (with the `test` dependency group installed)
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    sys.exit("check_generated.py needs Python 3.11 or later (tomllib)")

ROOT = Path(__file__).resolve().parent.parent
SOURCE_SUFFIXES = {".rs", ".py", ".pyi", ".cu", ".cuh", ".h"}


class Constant(NamedTuple):
    """A value that may be written down in one file only; `witness` is a part of it that nothing else contains."""

    name: str
    witness: str  # regular expression
    home: str
    copies: dict[str, str]  # file -> why it may hold a second copy


ORACLE = {
    "tests/golden/bitsandbytes_rule.py": "the independent definition that the code is held to",
    "python/ferrolora/ops/reference.py": "the readable twin; the parity tests hold it to the native table bit for bit",
}
GENERATED = {"cuda/common/codebook.cuh": "written by make_codebook.py; `stale_outputs` compares"}
CONSTANTS = [
    Constant("NF4 table", r"0\.69619|bf3239b1", "rust/core/src/codec/codebook/nf4.rs", {**ORACLE, **GENERATED}),
    Constant("FP4 thresholds", r"0\.0859375", "rust/core/src/codec/codebook/fp4.rs", ORACLE),
    Constant("version", r'"0\.1\.0"', "Cargo.toml", {"pyproject.toml": "pin of a test dependency, not ours"}),
]

GENERATORS = {
    "golden vectors": "tests/golden/make_golden.py",
    "benchmark report": "benches/report.py",
    "CUDA code tables": ".ci/make_codebook.py",
}


def tracked(suffixes: set[str]) -> Iterator[Path]:
    """Files git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    yield from (
        ROOT / line for line in listing.splitlines() if Path(line).suffix in suffixes and (ROOT / line).exists()
    )


def digits(path: Path) -> str:
    """The text with the underscores that Rust and Python allow inside numbers taken out."""
    return re.sub(r"(?<=[0-9a-f])_(?=[0-9a-f])", "", path.read_text())


def second_definitions() -> Iterator[str]:
    """A message for each constant written down outside its home, or absent from it."""
    for constant in CONSTANTS:
        if not re.search(constant.witness, digits(ROOT / constant.home)):
            yield f"{constant.name}: not found in its home {constant.home}"
        for path in tracked(SOURCE_SUFFIXES):
            place = str(path.relative_to(ROOT))
            if place in (constant.home, *constant.copies, ".ci/check_generated.py"):
                continue
            if re.search(constant.witness, digits(path)):
                yield f"{constant.name}: a second definition in {place}; its home is {constant.home}"


def stale_constraints() -> Iterator[str]:
    """A message for each requirement of pyproject.toml that the constraints file does not pin, or pins out of range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    tables = [project["project"]["optional-dependencies"], project["dependency-groups"]]
    groups = [project["project"]["dependencies"], *(group for table in tables for group in table.values())]
    lines = [line for group in groups for line in group if isinstance(line, str)]  # the rest are include-group tables
    pins = {}
    for line in (ROOT / ".ci/constraints.txt").read_text().splitlines():
        name, separator, version = line.partition("==")
        if separator:
            pins[name] = version
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue  # for another Python than the one the file is for
        pin = pins.get(requirement.name, "")
        if requirement.name != "ferrolora" and not (pin and requirement.specifier.contains(pin, prereleases=True)):
            yield f".ci/constraints.txt: {requirement} is pinned to {pin or 'nothing'}; run `just constraints`"


def stale_outputs() -> Iterator[str]:
    """A message for each file that is not what its generator writes now."""
    for what, script in GENERATORS.items():
        command = [sys.executable, script, "--check"]
        finished = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        if finished.returncode:
            yield f"{what}: {finished.stderr.strip()}"


def main() -> int:
    errors = [*second_definitions(), *stale_constraints(), *stale_outputs()]
    print("\n".join(errors) if errors else f"generated copies: current; {len(CONSTANTS)} constants with one definition")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
