"""The order of training examples: shuffled, with examples of like length side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer

POOL = 50  # batches that are sorted together: enough for little padding, few enough for batches to mix


class LengthGroupedSampler(Sampler[int]):
    """Shuffled indices in which each batch holds examples of about one length, so that little is padded.

    The order is a function of seed and epoch alone, not of torch's global generator. So a run that is resumed in the
    middle of an epoch sees the examples it would have seen, which transformers' own length grouping does not give.

    Args:
        lengths: tokens of each example.
        batch_size: examples of a batch.
        seed: of the shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is given next; data loaders call it."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        pool = POOL * self._batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), pool):
            by_length = sorted(order[start : start + pool], key=lambda i: self._lengths[i])
            batches += [by_length[i : i + self._batch_size] for i in range(0, len(by_length), self._batch_size)]
        # A short batch may only come last, or the batches after it would be cut elsewhere.
        last = batches.pop() if len(batches[-1]) < self._batch_size else []
        for position in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[position]
        yield from last


class LengthGroupedTrainer(Trainer):
    """`transformers.Trainer` whose training order is a `LengthGroupedSampler`'s."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(example["input_ids"]) for example in dataset]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)
