"""Trained keys and values in the cache class that a transformers model itself uses."""

from typing import Any

from torch import Tensor, nn

from ferrolora.adapters.prompt_base import PromptLearningConfig
from ferrolora.model.prompt_sizes import text_config


def make_cache(model: nn.Module, config: PromptLearningConfig, prefix: Tensor, is_decoded: bool) -> Any:
    """A cache that holds n keys and values in every layer.

    Args:
        model: its configuration says which layers have a sliding window.
        config: made concrete: n, layers, heads, kv_dim.
        prefix: [batch, n, layers·2·kv_dim].
        is_decoded: whether the model has a cross attention too, whose cache stays empty.

    Returns:
        A `DynamicCache`, or an `EncoderDecoderCache` around one.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    layers, heads = config.num_layers or 0, config.num_attention_heads or 1
    batch, count, width = prefix.shape
    # [layers·2, batch, heads, n, head_dim], keys before values in each layer
    parts = prefix.reshape(batch, count, layers * 2, heads, width // (layers * 2 * heads)).permute(2, 0, 3, 1, 4)
    cache = DynamicCache(config=text_config(model)) if not is_decoded else DynamicCache()
    for layer in range(layers):
        # In an encoder-decoder PEFT deals the keys and values out four to a layer, two of them to the cross attention,
        # which is then emptied: layer i gets those at 2i, and its files mean that.
        source = 2 * layer % layers if is_decoded else layer
        cache.update(parts[2 * source], parts[2 * source + 1], layer)
    return EncoderDecoderCache(cache, DynamicCache()) if is_decoded else cache
