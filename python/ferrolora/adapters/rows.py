"""A batch whose rows use different adapters: rows are grouped by adapter, and each group is computed once."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ferrolora.errors import ShapeError
from ferrolora.ops.linear import LowRank

BASE = "__base__"  # the name that stands for no adapter


class RowGroups:
    """Which rows of a batch use which adapter.

    Args:
        names: one adapter for each row of the batch; "__base__" for none.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.size = len(names)
        self.names = list(names)
        self.groups = {
            name: torch.tensor([row for row, other in enumerate(names) if other == name])
            for name in dict.fromkeys(names)
        }
        # Of each layer, by its id, while nothing is trained: generation calls a layer once a token.
        self.stacked: dict[int, LowRank] = {}

    def rows(self, name: str, x: Tensor) -> Tensor:
        """The rows of `x` (its first dimension) that use adapter `name`, as indices.

        Raises:
            ShapeError: as `rows_each`.
        """
        each = self.rows_each(x)
        indices = self.groups[name].to(x.device)
        return (indices[:, None] * each + torch.arange(each, device=x.device)).flatten()

    def rows_each(self, x: Tensor) -> int:
        """How many consecutive rows `x` has for each of the batch: several where tokens or beams are rows.

        Raises:
            ShapeError: the first dimension is no multiple of the batch.
        """
        if x.shape[0] % self.size:
            raise ShapeError(
                f"adapter_names has {self.size} entries, but a layer was called with {x.shape[0]} rows; "
                "a module that mixes the rows of a batch cannot use a different adapter for each"
            )
        return x.shape[0] // self.size


class ByName(Protocol):
    """A module whose output depends on the adapters that are named."""

    def forward_as(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The output with these adapters."""


def forward_groups(layer: ByName, x: Tensor, groups: RowGroups) -> Tensor:
    """The layer's output, each row of `x` with its own adapter: one call a distinct adapter."""
    if len(groups.groups) == 1:
        return layer.forward_as(x, _adapters(groups.names[0]))
    parts = {name: groups.rows(name, x) for name in groups.groups}
    outputs = [layer.forward_as(x[rows], _adapters(name)) for name, rows in parts.items()]
    order = torch.cat(list(parts.values()))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    return torch.cat(outputs)[inverse]


def _adapters(name: str) -> list[str]:
    return [] if name == BASE else [name]
