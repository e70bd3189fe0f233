"""A result file: machine, command and rows as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ferrolora.bench.row import Row, from_json, to_json
from ferrolora.errors import FormatError


class Result(NamedTuple):
    """What one run of the command measured.

    Args:
        machine: of `ferrolora.bench.machine`.
        command: what was typed, without the paths of a machine.
        rows: in the order of measurement.
    """

    machine: dict[str, Any]
    command: str
    rows: tuple[Row, ...]


def result_json(machine: dict[str, Any], command: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The content of a result file."""
    return {"machine": machine, "command": command, "rows": [to_json(row) for row in rows]}


def read_result(file: Path) -> Result:
    """Read a result file.

    Raises:
        FormatError: the file is not what `result_json` gives.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return Result(content["machine"], content["command"], tuple(from_json(row) for row in content["rows"]))
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{file}: no result of ferrolora bench: {error!r}") from error
