"""Prefix tuning: trained keys and values before those of every layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ferrolora.adapters.config import PeftType
from ferrolora.adapters.prompt_base import (
    FILE_KEY,
    PromptEncoder,
    PromptLearningConfig,
    PromptStart,
    Reparameterized,
    fill,
    needed,
)
from ferrolora.errors import UnsupportedError


@dataclass
class PrefixTuningConfig(PromptLearningConfig):
    """n trained keys and values [n, layers·2·kv_dim] before those of every (decoder) layer.

    With a classification task and no projection this is P-tuning v2.

    Args:
        prefix_projection: make them from an embedding [n, kv_dim] by a two-layer network with tanh. Default False.
        encoder_hidden_size: width of that network; default None: `token_dim`.
        init_weights: "zero" starts all keys and values at zero. Default None: N(0, 1).

    The other fields are those of every method of virtual tokens; `token_dim` is kv heads times their width, and
    `num_attention_heads` the number of kv heads.

    Source: arXiv 2101.00190; P-tuning v2, arXiv 2110.07602.
    """

    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: str | None = None

    gives_keys_and_values: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.PREFIX_TUNING
        if self.init_weights not in (None, "zero"):
            raise UnsupportedError(f"PrefixTuningConfig(init_weights={self.init_weights!r}): choose 'zero' or None")


def prefix_sizes(config: PrefixTuningConfig) -> tuple[int, int, int]:
    """(n, kv_dim, layers) of a configuration that was made concrete for a model."""
    assert config.num_virtual_tokens is not None
    assert config.token_dim is not None
    assert config.num_layers is not None
    return config.num_virtual_tokens, config.token_dim, config.num_layers


class PrefixEmbedding(PromptEncoder):
    """The keys and values themselves: `embedding.weight` [n, layers·2·kv_dim]."""

    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        count, dim, layers = prefix_sizes(config)
        self.embedding = nn.Embedding(count, layers * 2 * dim)
        if config.init_weights == "zero":
            nn.init.zeros_(self.embedding.weight)

    def forward(self, task_ids: Tensor | None = None) -> Tensor:
        """[n, layers·2·kv_dim]."""
        return self.embedding.weight

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        fill(self.embedding.weight, needed(tensors, FILE_KEY), FILE_KEY)


class _Projection(nn.Module):
    def __init__(self, config: PrefixTuningConfig) -> None:
        super().__init__()
        count, dim, layers = prefix_sizes(config)
        hidden = config.encoder_hidden_size or dim
        self.embedding = nn.Embedding(count, dim)
        last = nn.Linear(hidden, layers * 2 * dim)
        self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), last)
        if config.init_weights == "zero":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self) -> Tensor:
        made: Tensor = self.transform(self.embedding.weight)
        return made


def build(config: PromptLearningConfig, start: PromptStart) -> PromptEncoder:
    """The encoder of prefix tuning, with the projection or without."""
    assert isinstance(config, PrefixTuningConfig)
    if not config.prefix_projection:
        return PrefixEmbedding(config)
    config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim
    return Reparameterized(_Projection(config))
