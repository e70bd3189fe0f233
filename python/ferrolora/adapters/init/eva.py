"""EVA: the adapter starts along the directions in which its inputs vary most."""

import torch
from torch import Tensor

from ferrolora.adapters.init.kaiming import kaiming
from ferrolora.adapters.init.start import Start


def eva(start: Start) -> None:
    """The Kaiming start, until `initialize_lora_eva_weights` has seen data and puts the directions into A.

    Source: EVA, arXiv 2410.07170.
    """
    kaiming(start)


class InputDirections:
    """The largest right singular vectors of a stream of centred inputs, batch by batch.

    Args:
        count: how many directions are kept.

    Source: the incremental SVD of Ross et al., "Incremental Learning for Robust Visual Tracking", 2008, section 2.2.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self.mean: Tensor | None = None
        self.variation = 0.0  # sum of squares of the centred inputs, over all that was seen
        self.values: Tensor | None = None  # [k]
        self.vectors: Tensor | None = None  # [k, in]

    def update(self, x: Tensor) -> None:
        """Takes in a batch of inputs `[n, in]`."""
        x = x.float()
        n, mean = x.shape[0], x.float().mean(0)
        centred = x - mean
        rows = [centred]
        self.variation += float(centred.square().sum())
        if self.mean is not None and self.values is not None and self.vectors is not None:
            total = self.seen + n
            shift = (self.mean - mean) * (self.seen * n / total) ** 0.5
            self.variation += float(shift.square().sum())
            rows = [self.values[:, None] * self.vectors, centred, shift[None]]
            mean = (self.mean * self.seen + mean * n) / total
        _, values, vectors = torch.linalg.svd(torch.cat(rows), full_matrices=False)
        self.values, self.vectors = values[: self.count], vectors[: self.count]
        self.mean, self.seen = mean, self.seen + n

    def explained(self) -> Tensor:
        """The share of the inputs' variance along each direction, `[k]`, largest first."""
        assert self.values is not None
        return self.values.square() / max(self.variation, torch.finfo(torch.float32).tiny)
