"""A tiny model directory and a way to run a command."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from transformers.utils import logging

from ferrolora.cli.app import run
from tiny.folders import save
from tiny.models import bert_classifier, llama


@pytest.fixture(autouse=True)
def loud_transformers() -> Iterator[None]:
    """Commands quieten transformers for their process; other tests read what it logs."""
    level = logging.get_verbosity()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


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
