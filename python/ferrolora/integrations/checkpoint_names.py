"""Which tensors of a checkpoint are weights of linear layers, by building its model without memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from ferrolora.errors import UnsupportedError
from ferrolora.integrations.transformers import quantizable_experts, quantizable_linears
from ferrolora.io.checkpoint import Checkpoint


@dataclass(frozen=True)
class LinearTensors:
    """Names of checkpoint tensors.

    Attributes:
        weights: weights of linear layers that may be quantized.
        transposed: those of them that are stored `[K, N]`.
        fused: weights that the model merges with others as it loads; they stay in float.
    """

    weights: list[str]
    transposed: list[str]
    fused: list[str]


def linear_tensors(directory: Path, skip_modules: Sequence[str] = ()) -> LinearTensors:
    """Find the weights to quantize in a model directory; no weight is read.

    Args:
        directory: with `config.json` and safetensors shards.
        skip_modules: modules to leave out, as in `FerroloraConfig`.

    Raises:
        UnsupportedError: the model has no linear layer to quantize; or it has fused experts, which a checkpoint holds
            one by one, and skip_modules does not name them.
    """
    model = meta_model(directory)
    experts = quantizable_experts(model, skip_modules)
    if experts:
        raise UnsupportedError(
            f"{directory}: {experts[0]} holds fused experts, which are packed as a model loads, not shard by shard. "
            "from_pretrained(…, quantization_config=FerroloraConfig()) and save_pretrained write the quantized "
            "checkpoint; skipping 'experts' leaves them in float"
        )
    wanted = {f"{name}.weight" for name in quantizable_linears(model, skip_modules)}
    conv = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    state = model.state_dict()
    found = LinearTensors([], [], [])
    for name in Checkpoint(directory).tensors:
        in_model, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if in_model not in wanted:
            continue
        if pattern is not None:
            found.fused.append(name)
            continue
        found.weights.append(name)
        if in_model in conv:
            found.transposed.append(name)
    if not found.weights:
        raise UnsupportedError(f"{directory}: {type(model).__name__} has no linear layer to quantize")
    return found


def meta_model(directory: Path) -> Any:
    """The model that `directory`'s config describes, of its first architecture, on the meta device."""
    config = transformers.AutoConfig.from_pretrained(directory)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    with torch.device("meta"):
        # _from_config is what AutoModel.from_config calls on the class it has chosen.
        if cls is not None:
            return cls._from_config(config)
        make: Any = transformers.AutoModel.from_config
        return make(config)
