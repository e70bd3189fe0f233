"""The table that `test_method_table.py` fills, printed when the session ends."""

from collections import defaultdict
from typing import Any

import pytest

Cells = dict[tuple[str, str], dict[str, str]]

_CELLS: Cells = defaultdict(dict)  # (method, base) -> {check: "pass" or a number of a reason}
_REASONS: list[str] = []


@pytest.fixture(scope="session")
def method_table() -> Cells:
    """The cells, filled by the tests that passed."""
    return _CELLS


@pytest.fixture(scope="session")
def method_reasons() -> list[str]:
    """Why cells cannot exist, numbered from 1 in the table."""
    return _REASONS


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table."""
    if not _CELLS:
        return
    checks = list(dict.fromkeys(check for row in _CELLS.values() for check in row))
    width = max(len(method) for method, _ in _CELLS)
    terminalreporter.section("adapter methods")
    terminalreporter.write_line(f"{'method':{width}}  {'base':8} " + " ".join(f"{check:>9}" for check in checks))
    for (method, base), row in _CELLS.items():
        cells = " ".join(f"{row.get(check, '-'):>9}" for check in checks)
        terminalreporter.write_line(f"{method:{width}}  {base:8} {cells}")
    for number, reason in enumerate(_REASONS, 1):
        terminalreporter.write_line(f"[{number}] {reason}")
