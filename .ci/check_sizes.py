"""Check the size of files and Python functions: one concept a file, a function that fits a screen.

    python .ci/check_sizes.py

A file over 400 lines is reported, over 600 it fails; a Python function of 60 lines or more, docstring aside, fails.
Rust functions are clippy's (`too_many_lines`, the same limit, clippy.toml).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".pyi", ".rs", ".cu", ".cuh", ".h", ".sh"}
SOFT_LIMIT, HARD_LIMIT, FUNCTION_LIMIT = 400, 600, 60


def sources() -> list[Path]:
    """Tracked and new source files, as git sees them: what it ignores is not ours."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = (ROOT / line for line in listing.splitlines())
    return sorted(path for path in paths if path.suffix in SUFFIXES and path.exists())


def long_functions(path: Path) -> Iterator[str]:
    """Messages for the functions of a Python file that exceed the limit."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        documented = ast.get_docstring(node, clean=False) is not None
        first = node.body[0]
        prose = (first.end_lineno or first.lineno) - first.lineno + 1 if documented else 0
        length = (node.end_lineno or node.lineno) - node.lineno + 1 - prose
        if length >= FUNCTION_LIMIT:
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            yield f"{place}: {node.name} has {length} lines, the limit is {FUNCTION_LIMIT - 1}"


def main() -> int:
    errors: list[str] = []
    paths = sources()
    for path in paths:
        lines = len(path.read_text().splitlines())
        if lines > HARD_LIMIT:
            errors.append(f"{path.relative_to(ROOT)}: {lines} lines, the limit is {HARD_LIMIT}")
        elif lines > SOFT_LIMIT:
            print(f"warning: {path.relative_to(ROOT)}: {lines} lines, aim for {SOFT_LIMIT}")
        if path.suffix == ".py":
            errors.extend(long_functions(path))
    print("\n".join(errors) if errors else f"sizes: {len(paths)} source files within the limits")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
