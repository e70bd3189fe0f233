"""T-Few: losses over answer choices, and classification by ranking them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ferrolora.errors import ShapeError, UnsupportedError

if TYPE_CHECKING:
    from transformers import EvalPrediction

IGNORED = -100  # the label of positions that do not count


class ChoiceLosses(NamedTuple):
    """The three terms of T-Few's loss, each a mean over a batch."""

    lm: Tensor
    unlikelihood: Tensor
    length_normalised: Tensor


def token_log_probs(logits: Tensor, labels: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """log p of each label under the logits, and which positions count.

    Args:
        logits: `[rows, T, V]`; more positions in front (virtual tokens) are passed over.
        labels: `[rows, T]`, -100 where nothing is predicted.
        shift: the logits at t predict the label at t + 1 (causal language models).

    Returns:
        log p `[rows, T']` (0 where nothing counts) and the mask `[rows, T']`, T' = T - 1 with `shift`.
    """
    logits = logits[:, logits.shape[1] - labels.shape[1] :]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    mask = labels != IGNORED
    chosen = F.log_softmax(logits.float(), -1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    return chosen * mask, mask


def choice_scores(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """β = the mean log p of a choice's tokens, `[rows]`; -inf for a row without tokens (padding of choices)."""
    log_probs, mask = token_log_probs(logits, labels, shift)
    counts = mask.sum(1)
    return torch.where(counts > 0, log_probs.sum(1) / counts.clamp_min(1), -torch.inf)


def choice_losses(logits: Tensor, labels: Tensor, choices: int, shift: bool) -> ChoiceLosses:
    """L_LM, L_UL and L_LN of examples whose correct choice stands first.

        L_LM = −(1/T)·Σ_t log p(y_t)                                     of the correct choice y
        L_UL = −Σ_n Σ_t log(1 − p(ŷⁿ_t)) / Σ_n Tⁿ                        of the wrong choices ŷⁿ
        L_LN = −log(exp β(y) / (exp β(y) + Σ_n exp β(ŷⁿ)))               β: mean log p of a choice

    Args:
        logits: `[examples·choices, T, V]`, the choices of an example one after the other.
        labels: `[examples·choices, T]`; a row of -100 alone is no choice.
        choices: how many rows an example has.
        shift: see `token_log_probs`.

    Raises:
        ShapeError: the rows are no multiple of `choices`.

    Source: T-Few, arXiv 2205.05638, section 3.2.
    """
    if choices < 2 or labels.shape[0] % choices:
        raise ShapeError(f"{labels.shape[0]} rows are not examples of {choices} choices each (2 or more)")
    log_probs, mask = token_log_probs(logits, labels, shift)
    scores = choice_scores(logits, labels, shift).view(-1, choices)
    first = torch.arange(labels.shape[0], device=labels.device) % choices == 0
    lm = -log_probs[first].sum() / mask[first].sum().clamp_min(1)
    wrong = mask & ~first[:, None]
    # log(1 − p) by way of 1 − exp(log p), kept away from −inf where the model is certain
    unlikely = torch.log1p(-log_probs.exp().clamp_max(1 - 1e-6))
    unlikelihood = -(unlikely * wrong).sum() / wrong.sum().clamp_min(1)
    length_normalised = (torch.logsumexp(scores, 1) - scores[:, 0]).mean()
    return ChoiceLosses(lm, unlikelihood, length_normalised)


@dataclass(frozen=True)
class TFewLoss:
    """L_LM + L_UL + L_LN as transformers' Trainer takes a loss: `Trainer(…, compute_loss_func=TFewLoss(choices=4))`.

    Args:
        choices: rows of an example; the correct one first (see `ChoiceCollator`).
        shift: True for causal language models, False (default) for encoder-decoders.
    """

    choices: int
    shift: bool = False

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The sum of the three terms. The number of items is not used: each term is a mean of its own."""
        return torch.stack(choice_losses(outputs["logits"], labels, self.choices, self.shift)).sum()


@dataclass(frozen=True)
class RankClassification:
    """Accuracy of choosing the choice with the largest mean log p, for transformers' Trainer.

    `Trainer(…, preprocess_logits_for_metrics=rank.scores, compute_metrics=rank.accuracy)`

    Args: as `TFewLoss`.
    """

    choices: int
    shift: bool = False

    def scores(self, logits: Any, labels: Tensor) -> Tensor:
        """β of each choice `[examples, choices]`: all that is kept of the logits."""
        first = logits[0] if isinstance(logits, tuple) else logits
        return choice_scores(first, labels, self.shift).view(-1, self.choices)

    def accuracy(self, prediction: EvalPrediction) -> dict[str, float]:
        """Share of examples whose first choice beats all others."""
        scores = torch.as_tensor(prediction.predictions)
        return {"accuracy": float((scores[:, 0] > scores[:, 1:].amax(1)).float().mean())}


@dataclass(frozen=True)
class ChoiceCollator:
    """Examples with answer choices to a batch of rows: the correct choice first, padded to one number of choices.

    An example is `{"input_ids": [...], "choices": [[...], ...], "correct": i}` of token ids.

    Args:
        choices: rows of an example; fewer are filled up with rows that do not count.
        pad_token_id: fills up ids.
        shift: True for causal language models: input and choice stand in one row. Default False: the choice is what
            the decoder is to give.
        decoder_start_token_id: of an encoder-decoder, to make `decoder_input_ids`: Trainer keeps labels from a model
            whose loss is computed outside of it. Default None: none are made.
    """

    choices: int
    pad_token_id: int
    shift: bool = False
    decoder_start_token_id: int | None = None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` (and `decoder_input_ids`), each `[examples·choices, …]`."""
        inputs: list[list[int]] = []
        labels: list[list[int]] = []
        for example in examples:
            answers, correct = list(example["choices"]), int(example["correct"])
            if not 2 <= len(answers) <= self.choices or not 0 <= correct < len(answers):
                raise UnsupportedError(
                    f"an example with {len(answers)} choices, the correct one at {correct}: "
                    f"give 2 to {self.choices} choices and an index of one of them"
                )
            ordered = [answers[correct], *answers[:correct], *answers[correct + 1 :]]
            prompt = list(example["input_ids"])
            for answer in ordered + [[]] * (self.choices - len(ordered)):
                inputs.append(prompt + list(answer) if self.shift else prompt)
                labels.append(([IGNORED] * len(prompt) if self.shift else []) + list(answer))
        ids = _padded(inputs, self.pad_token_id)
        mask = _padded([[1] * len(row) for row in inputs], 0)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": _padded(labels, IGNORED)}
        if self.decoder_start_token_id is not None:
            shifted = [[self.decoder_start_token_id, *row[:-1]] for row in labels]
            width = batch["labels"].shape[1]
            batch["decoder_input_ids"] = _padded([row[:width] for row in shifted], self.pad_token_id)
        return batch


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(1, *(len(row) for row in rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
