"""A quantized model directory as the float one that it stands for, decoded a tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ferrolora.errors import UnsupportedError
from ferrolora.io.checkpoint import Checkpoint
from ferrolora.io.shard import TensorInfo
from ferrolora.nn.expert_stack import HEADER
from ferrolora.nn.experts import PROJECTIONS
from ferrolora.nn.quant_state import STATE_KEY, from_state, read_spec, state_keys
from ferrolora.tensor import QuantTensor


class DecodedCheckpoint(Checkpoint):
    """The tensors of a quantized checkpoint by the names, shapes and types they have unquantized.

    A reader gives packed weights decoded to float32, not yet rounded to the type that `tensors` states.

    Args:
        path: as for `Checkpoint`.
        transposed: weights that their modules hold `[K, N]`, as GPT-2's Conv1D does; packed they are `[N, K]`.
        dtype: the type of weights whose packed form does not record it (int8).

    Raises:
        FormatError: as `Checkpoint`, or a packed weight that lacks a part or cannot be read.
        UnsupportedError: the checkpoint holds packed experts.
    """

    def __init__(self, path: str | os.PathLike[str], transposed: Collection[str], dtype: torch.dtype) -> None:
        super().__init__(path)
        self._transposed, self._dtype = transposed, dtype
        self._packed: set[str] = set()
        self._stored = Checkpoint(path)
        experts = [name for name in self.tensors if name.endswith(tuple(f"{key}_{HEADER}" for key in PROJECTIONS))]
        if experts:
            raise UnsupportedError(
                f"{path}: {experts[0].removesuffix(f'_{HEADER}')} holds packed experts, which are not decoded file by "
                "file; load model and adapter, then save what merge_and_unload() gives"
            )
        with self._stored.reading() as reader:
            for prefix in _prefixes(self._stored):
                packed = _read(self._stored, reader, prefix, dtype)
                name = f"{prefix}weight"
                for key in state_keys(packed.spec):
                    del self.tensors[prefix + key]
                    home = self.file_of.pop(prefix + key)
                shape = tuple(packed.shape[::-1] if name in transposed else packed.shape)
                self.tensors[name], self.file_of[name] = TensorInfo(packed.dtype, shape), home
                self._packed.add(name)

    @contextmanager
    def reading(self) -> Iterator[Any]:
        """Open every file once; `reader[name]` then reads, and decodes, one tensor."""
        with self._stored.reading() as reader:
            yield _Decoding(self, reader)

    def decode(self, name: str, reader: Any) -> Tensor:
        """One tensor, read by a reader of the stored checkpoint."""
        if name not in self._packed:
            stored: Tensor = reader[name]
            return stored
        weight = _read(self._stored, reader, name.removesuffix("weight"), self._dtype).dequantize(torch.float32)
        return weight.T if name in self._transposed else weight


class _Decoding:
    def __init__(self, checkpoint: DecodedCheckpoint, reader: Any) -> None:
        self._checkpoint, self._reader = checkpoint, reader

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.decode(name, self._reader)


def _prefixes(checkpoint: Checkpoint) -> list[str]:
    """The modules whose weight is packed, each with its trailing dot."""
    found = (
        name.partition(STATE_KEY)[0] if STATE_KEY in name else name.removesuffix("SCB")
        for name in checkpoint.tensors
        if STATE_KEY in name or name.rpartition(".")[2] == "SCB"
    )
    return list(dict.fromkeys(found))


def _read(checkpoint: Checkpoint, reader: Any, prefix: str, dtype: torch.dtype) -> QuantTensor:
    described = {name: reader[name] for name in checkpoint.tensors if name.startswith(prefix + STATE_KEY)}
    if f"{prefix}SCB" in checkpoint.tensors:
        described[f"{prefix}SCB"] = reader[f"{prefix}SCB"]
    keys = [prefix + key for key in state_keys(read_spec(described, prefix))]
    return from_state({key: reader[key] for key in keys if key in checkpoint.tensors}, prefix, dtype=dtype)
