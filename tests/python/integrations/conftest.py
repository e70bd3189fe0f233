"""Prints which versions of the other libraries the integrations were tested with."""

from importlib.metadata import version

import pytest

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "datasets",
    "diffusers",
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of compatibility, at the end of a run that holds these tests."""
    terminalreporter.section("integrations were tested with")
    for name in LIBRARIES:
        terminalreporter.write_line(f"{name:14} {version(name)}")
