"""For how many rows a fused product beats decoding first, measured on the card at hand by `ferrolora bench --tune`."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch

from ferrolora.errors import FormatError


def table_file() -> Path:
    """Where the measured table is: `$XDG_CACHE_HOME/ferrolora/crossover.json`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ferrolora" / "crossover.json"


@functools.cache
def _table() -> dict[str, int]:
    """Name of a GPU -> the most rows for which the fused product won; empty before the first `--tune`."""
    file = table_file()
    if not file.is_file():
        return {}
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{file} is not JSON ({error}); delete it and run `ferrolora bench --tune` again") from error
    if not isinstance(table, dict) or not all(type(rows) is int and rows >= 0 for rows in table.values()):
        raise FormatError(f"{file} must map names of GPUs to rows; delete it and run `ferrolora bench --tune` again")
    return table


@functools.cache
def tuned_rows(index: int) -> int | None:
    """The measured crossover of the device `index`, or None: the planner's own table.

    Raises:
        FormatError: the table is there but not readable; says which file.
    """
    table = _table()
    return table.get(torch.cuda.get_device_name(index)) if table else None


def record(name: str, rows: int) -> Path:
    """Write the crossover of a GPU into the table, for calls in later processes.

    Args:
        name: of the GPU, as torch names it.
        rows: the most rows for which the fused product won.

    Returns: the file.
    """
    file = table_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({**_table(), name: rows}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(file)
    return file
