"""How commands speak: results on stdout as text or JSON, progress on stderr and only on a terminal."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ferrolora.errors import FerroloraError, FormatError

Update = Callable[[int, int, str], None]  # (done, in all, note)


def print_json(content: Any) -> None:
    """Write one JSON document to stdout."""
    print(json.dumps(content, indent=2))


def print_table(rows: Sequence[Sequence[str]], header: Sequence[str], left: int = 1) -> None:
    """Write aligned columns to stdout: the first `left` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        pairs = list(zip(row, widths, strict=True))
        cells = [*(text.ljust(width) for text, width in pairs[:left]), *(text.rjust(n) for text, n in pairs[left:])]
        print("  ".join(cells).rstrip())


def megabytes(count: float) -> str:
    """Bytes as text in units of 1000, with three significant digits or more."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{1 if count >= 10 * size else 2}f} {unit}"
    return f"{count:.0f} B"


@contextmanager
def progress(title: str, in_bytes: bool = False) -> Iterator[Update]:
    """A progress bar on stderr; does nothing if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total, note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn(title), BarColumn(), count, TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


def quiet_transformers() -> None:
    """Keep transformers from writing to the terminal: its progress bars, and reports of what it loads."""
    from transformers.utils import logging as transformers_logging

    settings: Any = transformers_logging
    settings.set_verbosity_error()
    settings.disable_progress_bar()


@contextmanager
def model_errors(model: str) -> Iterator[None]:
    """Turn what transformers raises for an unusable model into one error that names the model and the cause."""
    # An error in a single weight is not raised but logged, in a report over many lines, before a general one is raised.
    report = io.StringIO()
    logger = logging.getLogger("transformers")
    level, handlers, logger.handlers = logger.level, logger.handlers, [logging.StreamHandler(report)]
    logger.setLevel(logging.WARNING)
    try:
        yield
    except FerroloraError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        where = "" if os.path.isdir(model) else " (not a local directory)"
        ours = re.search(r"^ferrolora\.errors\.\w+: (.+)$", report.getvalue(), flags=re.MULTILINE)
        raise FormatError(f"cannot load the model {model!r}{where}: {ours[1] if ours else error}") from error
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
