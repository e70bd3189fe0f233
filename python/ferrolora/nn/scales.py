"""Scales of packed weights as buffers of a module: they move with it, but never change their type."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def types_kept(module: nn.Module, names: Sequence[str], fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Around `nn.Module._apply(fn)`: the buffers `names` follow to fn's device without its change of type.

    Half-precision scales would change every weight of their block.
    """
    scales = {name: module._buffers[name] for name in names}
    module._buffers.update(dict.fromkeys(scales))  # out of the way of nn.Module, which would cast them
    try:
        yield
    finally:
        module._buffers.update(scales)
    for name, scale in scales.items():
        module._buffers[name] = None if scale is None else _moved(scale, fn)


def _moved(scale: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    moved = fn(scale)
    return moved if moved.dtype == scale.dtype else scale.to(moved.device)
