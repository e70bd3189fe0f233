"""What a reader needs to judge the figures: processor, instruction sets, threads, versions."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ferrolora import _native

CPU_INFO = Path("/proc/cpuinfo")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "kernels")


def machine(threads: int) -> dict[str, Any]:
    """The header of every result.

    Args:
        threads: torch threads of the run.

    Returns:
        date, cpu, instruction_sets (what the processor has), available_isas and ferrolora_isa (what the kernels can use
        and do use), cores, threads, omp_wait_policy, python, load_average (None where the system has none), versions.
    """
    processor = _processor()
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": processor.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [
            flag for flag in sorted(processor.get("flags", "").split()) if flag.startswith(("avx", "amx", "fma"))
        ],
        "available_isas": _native.available_isas(),
        "ferrolora_isa": _native.isa(),
        "cores": os.cpu_count(),
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "versions": {"ferrolora": _native.version()} | {name: found for name in PACKAGES if (found := _version(name))},
    }


def _processor() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty on a system without it."""
    if not CPU_INFO.is_file():
        return {}
    first = CPU_INFO.read_text(encoding="utf-8").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
