"""Prompt tuning: virtual tokens before the input embeddings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ferrolora.adapters.config import PeftType
from ferrolora.adapters.prompt_base import FILE_KEY, PromptEncoder, PromptLearningConfig, PromptStart, fill, needed
from ferrolora.errors import UnsupportedError

STARTS = ("RANDOM", "TEXT", "SAMPLE_VOCAB")


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """n trained vectors [n, dim] before the input embeddings of the encoder or the language model.

    Args:
        prompt_tuning_init: "RANDOM" (default; N(0, 1)), "TEXT" (embeddings of a text, repeated or cut), or
            "SAMPLE_VOCAB" (embeddings of random tokens).
        prompt_tuning_init_text: the text for "TEXT".
        tokenizer_name_or_path: the tokenizer for "TEXT".
        tokenizer_kwargs: its options.

    The other fields are those of every method of virtual tokens.

    Raises:
        UnsupportedError: an unknown start, or "TEXT" without text or tokenizer.

    Source: arXiv 2104.08691.
    """

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PROMPT_TUNING
        self.check_start(STARTS)

    def check_start(self, valid: tuple[str, ...]) -> None:
        """Raises UnsupportedError unless the start is one of `valid`, with what it needs."""
        kind = type(self).__name__
        self.prompt_tuning_init = str(getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init))
        if self.prompt_tuning_init not in valid:
            raise UnsupportedError(
                f"{kind}(prompt_tuning_init={self.prompt_tuning_init!r}) is unknown; choose one of {', '.join(valid)}"
            )
        is_text = self.prompt_tuning_init == "TEXT"
        if is_text and not (self.prompt_tuning_init_text and self.tokenizer_name_or_path):
            raise UnsupportedError(f"{kind}: 'TEXT' needs prompt_tuning_init_text and tokenizer_name_or_path")
        if self.tokenizer_kwargs and not is_text:
            raise UnsupportedError(f"{kind}: tokenizer_kwargs is for prompt_tuning_init='TEXT'")


class PromptEmbedding(PromptEncoder):
    """The tokens themselves: `embedding.weight` [n, dim]."""

    def __init__(self, config: PromptLearningConfig, start: PromptStart) -> None:
        super().__init__()
        assert isinstance(config, PromptTuningConfig)
        count, dim = config.sizes()
        self.embedding = nn.Embedding(count, dim)
        if config.inference_mode:
            return  # the values come from a file
        ids = None
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, start.vocabulary, (count,))
        elif config.prompt_tuning_init == "TEXT":
            if not start.text:
                raise UnsupportedError("PromptTuningConfig: the tokenizer made no token of prompt_tuning_init_text")
            ids = torch.tensor((list(start.text) * math.ceil(count / len(start.text)))[:count])
        if ids is not None:
            self.embedding.weight = nn.Parameter(start.rows(ids).detach().float().clone())

    def forward(self, task_ids: Tensor | None = None) -> Tensor:
        """[n, dim]."""
        return self.embedding.weight

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        fill(self.embedding.weight, needed(tensors, FILE_KEY), FILE_KEY)
