"""The text format of the golden vectors: records of `key value` lines, parted by a blank line.

Arrays are lower-case hex of their little-endian bytes, row-major; everything else is a word or a decimal integer.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

Record = dict[str, str]


def bits(tensor: Tensor) -> str:
    """Hex of the tensor's bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex()


def tensor(text: str, dtype: torch.dtype) -> Tensor:
    """The inverse of `bits`, flat."""
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8).view(dtype)


def render(records: Iterable[Record]) -> str:
    """The text of a file."""
    return "\n".join("".join(f"{key} {value}\n" for key, value in record.items()) for record in records)


def read(path: Path) -> list[Record]:
    """All records of a file."""
    blocks = path.read_text().strip().split("\n\n")
    return [dict(line.split(" ", 1) for line in block.splitlines()) for block in blocks]
