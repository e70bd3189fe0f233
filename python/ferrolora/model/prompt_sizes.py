"""The sizes that virtual tokens need, read off a transformers model's configuration."""

from typing import Any

from torch import nn

from ferrolora.adapters.config import TaskType
from ferrolora.adapters.prompt_base import PromptLearningConfig
from ferrolora.errors import UnsupportedError


def fill_sizes(model: nn.Module, config: PromptLearningConfig) -> None:
    """Sets what `config` leaves open: width, layers, heads, and how many submodules get tokens.

    Raises:
        UnsupportedError: the model's configuration does not tell one of them.
    """
    sizes = text_config(model)
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type == TaskType.SEQ_2_SEQ_LM else 1
    if config.num_layers is None:
        config.num_layers = _first(sizes, "num_layers", ("num_decoder_layers", "decoder_layers", *_LAYERS))
    if not config.gives_keys_and_values:
        config.token_dim = config.token_dim or _first(sizes, "token_dim", _WIDTHS)
        config.num_attention_heads = config.num_attention_heads or _first(sizes, "num_attention_heads", _HEADS)
        return
    if config.num_attention_heads is None:
        config.num_attention_heads = _first(sizes, "num_attention_heads", ("num_key_value_heads", *_HEADS))
    if config.token_dim is None:
        width = getattr(sizes, "head_dim", None) or getattr(sizes, "d_kv", None)
        if width is None:
            width = _first(sizes, "token_dim", _WIDTHS) // _first(sizes, "num_attention_heads", _HEADS)
        config.token_dim = width * config.num_attention_heads


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text part.

    Raises:
        UnsupportedError: the model has none.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedError("virtual tokens need a transformers model with a config")
    find = getattr(config, "get_text_config", None)
    return find() if callable(find) else config


_WIDTHS = ("hidden_size", "n_embd", "d_model")
_HEADS = ("num_attention_heads", "decoder_attention_heads", "n_head", "num_heads")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")


def _first(sizes: Any, field: str, names: tuple[str, ...]) -> int:
    for name in names:
        value = getattr(sizes, name, None)
        if isinstance(value, int):
            return value
    raise UnsupportedError(f"the model's configuration has none of {', '.join(names)}; give {field} yourself")
