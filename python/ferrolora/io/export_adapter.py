"""A LoRA adapter whose scaling is alpha / rank everywhere, for programs that know nothing else."""

from __future__ import annotations

import math
from pathlib import Path

from ferrolora.adapters.config import PeftConfig, pattern_value
from ferrolora.adapters.lora_config import LoraConfig
from ferrolora.errors import UnsupportedError
from ferrolora.io.adapter import read_config, read_tensors, write_adapter

_B_KEYS = (".lora_B.weight", ".lora_embedding_B")


def export_adapter(source: Path, destination: Path) -> int:
    """Writes the LoRA adapter in `source` with `lora_alpha = r`, no rank-stabilised scaling and no alpha pattern.

    B' = B·s·rank/r, with s the scaling of the module and rank its own, so that lora_alpha/rank·B' = s·B.

    Args:
        source: directory of a LoRA adapter.
        destination: directory to write.

    Returns:
        How many matrices B were scaled.

    Raises:
        UnsupportedError: another method, or a feature whose file other programs do not read (DoRA, trained rows).
    """
    config = PeftConfig.from_dict(read_config(source), where=str(source))
    if type(config) is not LoraConfig or config.use_dora or config.trainable_token_indices or config.lora_bias:
        raise UnsupportedError(f"{source}: only plain LoRA (no DoRA, lora_bias, trained rows) can be exported")
    if config.target_parameters:
        raise UnsupportedError(f"{source}: LoRA on experts (target_parameters) has no form that other programs read")
    tensors, count = read_tensors(source), 0
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _B_KEYS if key.endswith(suffix)), None)
        if suffix is None:
            continue
        path = key.removesuffix(suffix).removeprefix("base_model.model.")
        rank = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        tensors[key] = tensor * (scaling * rank / config.r)
        count += 1
    config.lora_alpha, config.alpha_pattern, config.use_rslora = config.r, {}, False
    write_adapter(destination, config.to_dict(), tensors)
    return count
