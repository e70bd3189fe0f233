"""Examples to token ids and labels, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ferrolora.errors import FormatError
from ferrolora.train.data import CausalExample, Conversation, LabelledText, PlainText, Segment

IGNORED = -100  # the label that torch's and transformers' cross entropy leaves out

Tokens = dict[str, Any]  # "input_ids": list[int], "labels": int or list[int]


@dataclass(frozen=True)
class TokenizedData(torch.utils.data.Dataset[Tokens]):
    """Tokenized examples and what length limits did to them.

    Attributes:
        examples: one dict an example.
        truncated: how many examples were cut to the length limit.
        dropped: how many were left out since the cut left nothing to train on.
    """

    examples: list[Tokens]
    truncated: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Tokens:
        return self.examples[index]


class PadCollator:
    """Pads a batch on the right to its longest example.

    Args:
        pad_id: token that fills `input_ids`; the attention mask is 0 there and per-token labels are ignored.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(example["input_ids"]) for example in batch)
        ids = torch.full((len(batch), width), self.pad_id)  # (B, T)
        mask = torch.zeros_like(ids)
        per_token = isinstance(batch[0]["labels"], list)
        labels = torch.full((len(batch), width), IGNORED) if per_token else torch.tensor([e["labels"] for e in batch])
        for row, example in enumerate(batch):
            length = len(example["input_ids"])
            ids[row, :length] = torch.tensor(example["input_ids"])
            mask[row, :length] = 1
            if per_token:
                labels[row, :length] = torch.tensor(example["labels"])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def tokenize_classification(
    rows: Sequence[LabelledText], names: Sequence[str], tokenizer: Any, max_length: int
) -> TokenizedData:
    """Token ids of each text, with the index of its label in `names`.

    Args:
        rows: labelled texts.
        names: label names; the position is the class index.
        tokenizer: a transformers tokenizer.
        max_length: tokens kept of a text, special tokens included.

    Raises:
        FormatError: a label that is not in `names`.
    """
    index = {name: i for i, name in enumerate(names)}
    examples, truncated = [], 0
    for row in rows:
        if row.label not in index:
            raise FormatError(f"label {row.label!r} (text {row.text[:40]!r}) is not one of {list(names)}")
        whole = len(tokenizer(row.text)["input_ids"])
        ids = tokenizer(row.text, truncation=True, max_length=max_length)["input_ids"]
        truncated += whole > len(ids)
        examples.append({"input_ids": ids, "labels": index[row.label]})
    return TokenizedData(examples, truncated=truncated)


def tokenize_causal(examples: Sequence[CausalExample], tokenizer: Any, max_length: int) -> TokenizedData:
    """Token ids and next-token labels of causal examples; tokens of prompts are ignored by the loss.

    Args:
        examples: documents and conversations become one sequence each; a plain text is cut into blocks.
        tokenizer: a transformers tokenizer.
        max_length: tokens of a sequence; longer documents are cut at the end.

    Raises:
        FormatError: nothing is left to train on, or the chat template cannot be followed.
    """
    done: list[Tokens] = []
    truncated = dropped = 0
    for example in examples:
        if isinstance(example, PlainText):
            done.extend(_blocks(example.text, tokenizer, max_length))
            continue
        is_chat = isinstance(example, Conversation)
        segments = _chat_segments(example, tokenizer) if isinstance(example, Conversation) else example.segments
        ids, labels = _join(segments, tokenizer, special_tokens=not is_chat)
        truncated += len(ids) > max_length
        # The first label is never predicted: logits are shifted by one.
        if all(label == IGNORED for label in labels[1:max_length]):
            dropped += 1
            continue
        done.append({"input_ids": ids[:max_length], "labels": labels[:max_length]})
    if not done:
        raise FormatError(f"no example has a token to train on within --max-length {max_length}")
    return TokenizedData(done, truncated, dropped)


def _blocks(text: str, tokenizer: Any, max_length: int) -> list[Tokens]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    blocks = [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
    return [{"input_ids": block, "labels": list(block)} for block in blocks if len(block) > 1]


def _join(segments: Sequence[Segment], tokenizer: Any, special_tokens: bool) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for position, segment in enumerate(segments):
        first = position == 0 and special_tokens
        piece = tokenizer(segment.text, add_special_tokens=first, verbose=False)["input_ids"]
        if first and piece and piece[-1] == tokenizer.eos_token_id:
            piece = piece[:-1]  # an end token belongs at the end of the example, not of its first segment
        ids += piece
        labels += piece if segment.trained else [IGNORED] * len(piece)
    if special_tokens and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return ids, labels


def _chat_segments(conversation: Conversation, tokenizer: Any) -> tuple[Segment, ...]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise FormatError(
            f"{conversation.place}: 'messages' need a tokenizer with a chat template, and this one has none; "
            "use 'prompt' and 'completion' instead"
        )
    messages = list(conversation.messages)
    segments, done = [], ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise FormatError(
                f"{conversation.place}: the chat template rewrites earlier turns, so the assistant's tokens cannot be "
                "told apart; use 'prompt' and 'completion' instead"
            )
        segments += [Segment(asked[len(done) :], False), Segment(answered[len(asked) :], True)]
        done = answered
    return tuple(segments)
