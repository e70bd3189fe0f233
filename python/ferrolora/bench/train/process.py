"""A worker process that answers one request at a time, and may die without taking the run with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any


class Died(Exception):
    """The worker ended before it answered; the message is the last line it wrote to stderr."""


class Process:
    """A running `ferrolora.bench.train.worker`.

    Args:
        library: the library under test.
        model: a key of `MODELS`.
        dtype: a key of `DTYPES`.
        threads: torch threads.
    """

    def __init__(self, library: str, model: str, dtype: str, threads: int) -> None:
        command = [sys.executable, "-m", "ferrolora.bench.train.worker", library, model, dtype, str(threads)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        # A pipe that nobody reads would fill and block. Open until `close`.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )

    def ask(self, what: str) -> dict[str, Any]:
        """The answer to a request: a method of `Worker`.

        Raises:
            Died: there was none.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Died(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the worker, whether it lives or has died."""
        self._process.communicate()
        self._errors.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"
