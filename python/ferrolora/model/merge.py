"""Leaving adapters: the base with the deltas in its weights, or the base as it was."""

from collections.abc import Sequence

import torch
from torch import nn

from ferrolora.adapters.base import AdapterLayer, dense_linear, sixteen_bit
from ferrolora.model.conv1d import conv1d_paths, restore_conv1d
from ferrolora.model.inject import replace_module, wrappers
from ferrolora.model.reversible import remove_stacks
from ferrolora.nn import QuantExperts, QuantLinear

# Attributes by which transformers knows that a model is quantized.
_QUANTIZED_MARKS = ("hf_quantizer", "is_quantized", "quantization_method")


def merge_and_unload(model: nn.Module, names: Sequence[str], dtype: torch.dtype | None) -> nn.Module:
    """Replaces every wrapper in `model` by a float module that holds W + Σ ΔW, and every packed one by a float one.

    Args:
        model: the base model with its wrappers; changed in place.
        names: the adapters to merge.
        dtype: float type of the whole result. None keeps a float model's own type; a model with packed weights
            becomes 16-bit: the type it computes in, or bfloat16.

    Returns:
        `model`, without adapters and without packed weights.
    """
    packed, from_conv1d = [*packed_linears(model), *packed_experts(model)], conv1d_paths(model)
    result_dtype = dtype or (sixteen_bit(packed[0]) if packed else None)
    for path, layer in list(wrappers(model)):
        if path.endswith(".base_layer"):
            continue  # a parameter of experts, whose outermost wrapper merges them all
        if isinstance(layer, AdapterLayer):
            replace_module(model, layer, layer.merged_module(names, result_dtype))
        else:
            layer.activate(names, trainable=False)
            replace_module(model, layer, layer.active_module)
    for module in packed_linears(model):
        assert result_dtype is not None
        replace_module(model, module, dense_linear(module, result_dtype))
    for experts in packed_experts(model):
        replace_module(model, experts, experts.dense(result_dtype))
    restore_conv1d(model, from_conv1d)
    if packed:
        _forget_quantization(model)
    _note_untied_weights(model)
    if result_dtype is not None:
        _cast_parameters(model, result_dtype)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Replaces every wrapper by the module it was put around, and returns `model`."""
    remove_stacks(model)
    for _, layer in list(wrappers(model)):
        original = layer.base_layer if isinstance(layer, AdapterLayer) else layer.original_module
        replace_module(model, layer, original)
    return model


def packed_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers whose weight is not float."""
    packed = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return [m for m in packed if isinstance(m, QuantLinear) or not m.weight.is_floating_point()]


def packed_experts(model: nn.Module) -> list[QuantExperts]:
    """The fused experts whose weights are not float."""
    return [module for module in model.modules() if isinstance(module, QuantExperts)]


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies and other float32 buffers lose accuracy in 16 bits."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _forget_quantization(model: nn.Module) -> None:
    """Removes what would make transformers treat the dense model, or a file of it, as quantized."""
    for name in _QUANTIZED_MARKS:
        if name in vars(model):
            delattr(model, name)
    config = getattr(model, "config", None)
    if config is not None and "quantization_config" in vars(config):
        del config.quantization_config


def _note_untied_weights(model: nn.Module) -> None:
    """A merge into one of two tied weights unties them: the configuration must not tie them again on loading."""
    config, find = getattr(model, "config", None), getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not getattr(config, "tie_word_embeddings", False) or head is None:
        return
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    if head.weight is not embedding.weight:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
