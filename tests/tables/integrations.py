"""The table of compatibility: what a run exercised of which version of which library, and with what outcome.

A test joins it with `@pytest.mark.integration("trl", "SFTTrainer")`, or a module with `pytestmark`; the first is the
name of the distribution, the second may name the test's parameters in braces: `"{method}: merging"`.
"""

from collections import Counter, defaultdict
from collections.abc import Generator
from importlib.metadata import version
from typing import Any

import pytest

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "ray", "diffusers", "bitsandbytes")
# Rows of whole modules; a marker goes before it.
MODULES = {
    "test_accelerate": ("accelerate", "DDP in two processes, cpu_offload"),
    "test_bitsandbytes_backend": ("bitsandbytes", "its operators on our kernels"),
    "test_bitsandbytes_label": ("bitsandbytes", "checkpoints both ways"),
    "test_diffusers": ("diffusers", "LoRA on UNets and DiTs, files both ways"),
    "test_fsdp": ("torch", "FSDP2 over packed codes"),
    "test_moe": ("transformers", "mixtures of experts"),
    "test_multimodal": ("transformers", "pictures and sounds"),
    "test_peft": ("peft", "unprepared base, fused LoRA, files"),
    "test_ray": ("ray", "Train, two workers"),
    "test_register": ("transformers", "registration by import"),
    "test_trainer": ("transformers", "Trainer with our PeftModel, resumed"),
    "test_zero": ("deepspeed", "ZeRO-2, ZeRO-3"),
    "test_transformers": ("transformers", "from_pretrained, save_pretrained, dequantize"),
}
_ROW = "integration"
_outcomes: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "integration(library, exercised): a row of the table of compatibility")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Notes a test's rows in its report, once: in that of its call, or of what came instead."""
    report = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        rows = [marker.args for marker in item.iter_markers("integration")]
        module = item.nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
        if not rows and module in MODULES:
            rows = [MODULES[module]]
        report.user_properties += [(_ROW, (library, text.format(**parameters))) for library, text in rows]
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts what the reports of all processes noted."""
    if report.when == "call" or (report.when == "setup" and not report.passed):
        for name, row in report.user_properties:
            if name == _ROW:
                _outcomes[tuple(row)][report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table in Markdown at the end of a run that holds such tests."""
    if not _outcomes:
        return
    terminalreporter.section("integrations")
    terminalreporter.write_line("| library | version | exercised | passed | failed | skipped |")
    terminalreporter.write_line("|---|---|---|---|---|---|")
    for library in sorted({*LIBRARIES} - {library for library, _ in _outcomes}):
        terminalreporter.write_line(f"| {library} | {version(library)} | nothing in this run | | | |")
    for (library, exercised), counts in sorted(_outcomes.items()):
        numbers = " | ".join(str(counts[outcome]) for outcome in ("passed", "failed", "skipped"))
        terminalreporter.write_line(f"| {library} | {version(library)} | {exercised} | {numbers} |")
