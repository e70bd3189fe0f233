"""The table of adapter methods that `test_method_table.py` fills: method × base × check."""

from collections import defaultdict

import pytest

_CELL = "method table"
_WORDS = {"passed": "pass", "failed": "FAIL", "skipped": "skipped"}
_cells: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)  # (method, base) -> {check: a word or a reason}


def cell(method: str, base: str, check: str, reason: str | None) -> tuple[str, tuple[str, str, str, str | None]]:
    """The property by which a test names its cell: with a reason why it cannot exist, or None for its outcome."""
    return _CELL, (method, base, check, reason)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Takes the cells from the reports of all processes."""
    if report.when == "call":
        for name, value in report.user_properties:
            if name == _CELL:
                method, base, check, reason = value
                _cells[method, base][check] = _WORDS[report.outcome] if reason is None else reason


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table, reasons by number below it."""
    if not _cells:
        return
    checks = list(dict.fromkeys(check for row in _cells.values() for check in row))
    words = set(_WORDS.values())
    reasons = list(dict.fromkeys(text for row in _cells.values() for text in row.values() if text not in words))
    width = max(len(method) for method, _ in _cells)
    terminalreporter.section("adapter methods")
    terminalreporter.write_line(f"{'method':{width}}  {'base':8} " + " ".join(f"{check:>9}" for check in checks))
    for (method, base), row in _cells.items():
        numbered = {check: text if text in words else f"[{reasons.index(text) + 1}]" for check, text in row.items()}
        cells = " ".join(f"{numbered.get(check, '-'):>9}" for check in checks)
        terminalreporter.write_line(f"{method:{width}}  {base:8} {cells}")
    for number, reason in enumerate(reasons, 1):
        terminalreporter.write_line(f"[{number}] {reason}")
