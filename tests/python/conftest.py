"""Fixtures that several packages' tests share."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from tables import integrations, methods

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each worker has a core; a test of threads sets its own number


def pytest_configure(config: pytest.Config) -> None:
    for plugin in (integrations, methods):
        config.pluginmanager.register(plugin)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, whichever tests run beside it."""
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Callable[[int], AbstractContextManager[None]]:
    """`with threads(n):` runs torch, and so the kernels, on n threads."""

    @contextmanager
    def run_on(count: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return run_on
