"""Everything here needs an NVIDIA GPU; without one it is skipped. `python tests/gpu/run.py WHEEL` runs it alone."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
USERS = ("quantize_4bit", "double_quantize", "int8", "decode", "linear_cuda")  # of `run`


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no GPU."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.timeout(600))  # the first run of a kernel compiles it
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that a test launches, in order."""
    names: list[str] = []
    for user in USERS:
        module: Any = importlib.import_module(f"ferrolora.ops.{user}")
        run = module.run

        def noting(launch: Any, index: int, given: Any, run: Any = run) -> None:
            names.append(launch.entry)
            run(launch, index, given)

        monkeypatch.setattr(module, "run", noting)
    return names


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    """Each test starts without workspaces, and leaves none."""
    from ferrolora.cuda import free_workspaces

    free_workspaces()
    yield
    free_workspaces()
