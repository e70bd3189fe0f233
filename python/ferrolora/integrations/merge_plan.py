"""What merging an adapter into a checkpoint needs to know of its model, without reading a weight."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ferrolora.integrations.checkpoint_names import linear_tensors, meta_model
from ferrolora.integrations.transformers import FerroloraConfig
from ferrolora.io.checkpoint import Checkpoint
from ferrolora.io.merge_checkpoint import MergePlan
from ferrolora.spec import QuantSpec


def merge_plan(
    directory: Path, spec: QuantSpec | None = None, dtype: str = "keep", min_retained: float = 0.8
) -> MergePlan:
    """The plan of a merge into the model in `directory`.

    Args:
        directory: with `config.json` and safetensors shards.
        spec: codec of the result's linear layers; None for a float result.
        dtype: "keep", or the name of a float type for everything that is not quantized.
        min_retained: see `MergePlan`.
    """
    model = meta_model(directory)
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    state = model.state_dict()
    names = {}
    for name in Checkpoint(directory).tensors:
        in_model, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None:  # a weight that is fused with others as it loads has no module of its own
            names[name] = in_model
    found = linear_tensors(directory) if spec is not None else None
    return MergePlan(
        model=model,
        names=names,
        quantized=() if found is None else found.weights,
        transposed=() if found is None else found.transposed,
        spec=spec,
        quantization_config=None if spec is None else FerroloraConfig.from_spec(spec).to_dict(),
        dtype=None if dtype == "keep" else getattr(torch, dtype),
        min_retained=min_retained,
    )
