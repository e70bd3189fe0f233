"""A tiny model directory and a way to run a command."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from ferrolora.cli.app import run
from tiny.folders import save
from tiny.models import bert_classifier, llama


class Outcome(NamedTuple):
    """What a command left: its status, and what it wrote."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`cli("inspect", path)` runs a command in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Outcome(status, out, err)

    return call


@pytest.fixture
def causal(tmp_path: Path) -> Path:
    """A saved causal model in several shards."""
    return save(llama(), tmp_path / "llama", shard_size="20KB")


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A saved encoder without a task head."""
    return save(bert_classifier().bert, tmp_path / "bert")
