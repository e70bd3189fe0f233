"""Resident memory of this process, and its high-water mark: Linux's /proc."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def is_measurable() -> bool:
    """Whether this system tells and can restart the high-water mark."""
    return STATUS.is_file() and CLEAR_REFS.exists()


def resident_bytes() -> int:
    """What is resident now."""
    return _field("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since the last `settle`."""
    return _field("VmHWM")


def settle() -> int:
    """Give freed memory back to the system, restart the peak, and return what is resident."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    CLEAR_REFS.write_text("5")  # resets VmHWM
    return resident_bytes()


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
