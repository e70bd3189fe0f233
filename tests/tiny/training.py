"""What the examples of distributed training print and write, and when two runs of them count as the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def losses(printed: str) -> list[float]:
    """The numbers of the lines `loss 4.134523`."""
    return [float(line.split()[1]) for line in printed.splitlines() if line.startswith("loss ")]


def assert_trained_alike(seen: list[float], alone: list[float], directory: Path, alone_in: Path) -> None:
    """Losses of several processes against those of one on the joint batch, and the adapters that they wrote."""
    assert len(alone) == 4
    assert alone[-1] < alone[0]
    # The mean of two means of 14 float32 losses of order 4 is their mean up to a few roundings, carried over 4 steps.
    assert seen == pytest.approx(alone, abs=2e-5)
    one, several = (load_file(place / "adapter_model.safetensors") for place in (alone_in, directory))
    assert one.keys() == several.keys()
    for name, value in one.items():
        torch.testing.assert_close(several[name], value, atol=2e-6, rtol=1e-4)
    for name in ("adapter_config.json", "README.md"):
        assert (directory / name).read_text() == (alone_in / name).read_text()
