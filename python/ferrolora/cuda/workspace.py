"""Memory that kernels use for the length of a call: one piece of each kind for each device and stream.

Work on one stream runs in order, so that calls take turns with one piece. A graph under capture gets its own from the
graph's pool: a later call that needs more would free the shared piece under the captured graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_held: dict[tuple[str, int, int], Tensor] = {}  # (kind, device, stream) -> as large as the largest call so far


def _take(kind: str, numel: int, dtype: torch.dtype, index: int, stream: int) -> Tensor:
    """`numel` elements, zero when they are first given out."""
    capturing, key = torch.cuda.is_current_stream_capturing(), (kind, index, stream)
    held = None if capturing else _held.get(key)
    if held is not None and held.numel() >= numel:
        return held
    make = torch.zeros if kind == "counters" else torch.empty
    if capturing:
        return make(numel, dtype=dtype, device=torch.device("cuda", index))
    del held
    _held.pop(key, None)  # before the larger one is allocated, so that both never exist
    _held[key] = make(numel, dtype=dtype, device=torch.device("cuda", index))
    return _held[key]


def weight(shape: tuple[int, int], dtype: torch.dtype, index: int, stream: int) -> Tensor:
    """An uninitialised matrix for a decoded weight, until the next call for the same device and stream.

    Args:
        shape: of the weight.
        dtype: of the weight.
        index: of the device.
        stream: handle of the device's current stream.
    """
    size = math.prod(shape) * dtype.itemsize
    return _take("weight", size, torch.uint8, index, stream)[:size].view(dtype).view(shape)


def scratch(size: int, index: int, stream: int) -> Tensor:
    """At least `size` uninitialised bytes for the partial sums of one launch."""
    return _take("scratch", size, torch.uint8, index, stream)


def counters(count: int, index: int, stream: int) -> Tensor:
    """At least `count` words of 32 bits that are zero; every kernel leaves them zero, so they are cleared only once."""
    return _take("counters", count, torch.int32, index, stream)


def free_workspaces() -> int:
    """Give the workspaces of all devices back to torch's caching allocator.

    The largest holds the largest weight that was multiplied on its stream, decoded; the next such product allocates it
    anew. Call it between phases, for example before generating after training.

    Returns:
        The bytes that were held.
    """
    size = sum(held.nbytes for held in _held.values())
    _held.clear()
    return size
