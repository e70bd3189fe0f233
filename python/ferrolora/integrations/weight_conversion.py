"""What happens to one linear layer's tensors as transformers loads or saves a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from ferrolora.errors import FormatError
from ferrolora.integrations.transformers import FLOAT_TYPES, FerroloraConfig
from ferrolora.nn import QuantLinear
from ferrolora.nn.quant_state import from_state


class QuantizeWeight(ConversionOps):
    """A float weight arrives: quantize it and put a `QuantLinear` in the place of its layer.

    Args:
        config: how to quantize.
    """

    def __init__(self, config: FerroloraConfig) -> None:
        self._config = config

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        """`{"<layer>.weight": float [N, K]}` to the packed weight under the same name."""
        model: nn.Module = context["model"]
        packed = {}
        for key, value in input_dict.items():
            name = key.removesuffix(".weight")
            layer: Any = model.get_submodule(name)
            weight = value[0] if isinstance(value, list) else value
            if isinstance(layer, Conv1D):
                weight = weight.T  # Conv1D keeps [K, N]
            source = nn.Linear(1, 1, bias=False, device="meta")
            source.weight = nn.Parameter(weight, requires_grad=False)
            source.bias = layer.bias
            _install(model, name, QuantLinear.from_linear(source, self._config.spec, name=key), self._config)
            packed[key] = model.get_parameter(key)
        return packed


class ReadQuantized(ConversionOps):
    """The tensors of one quantized layer arrive: check them and put a `QuantLinear` in its place.

    Every key that ends in `weight` comes this way; one that is alone is a plain float weight and only gets its type.

    Args:
        config: of the checkpoint.

    Attributes:
        float_dtype: the type for a plain weight; None keeps the stored one.
    """

    def __init__(self, config: FerroloraConfig) -> None:
        self._config = config
        self.float_dtype: torch.dtype | None = None

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        """`{"weight": …, "weight.absmax": …, …}` to the packed (or plain) weight under its full name."""
        model: nn.Module = context["model"]
        full_layer_name: str = context["full_layer_name"]
        state = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if set(state) == {"weight"}:
            plain = state["weight"]
            if not plain.is_floating_point():
                raise FormatError(f"{full_layer_name} is {plain.dtype}, but the tensors that decode it are missing")
            return {full_layer_name: plain.to(self.float_dtype)}
        name = full_layer_name.removesuffix(".weight")
        layer: Any = model.get_submodule(name)
        dtype = self.float_dtype if self.float_dtype is not None else torch.get_default_dtype()
        qt = from_state({f"{name}.{key}": value for key, value in state.items()}, f"{name}.", _shape(layer), dtype)
        _install(model, name, QuantLinear.from_quant_tensor(qt, layer.bias), self._config)
        return {full_layer_name: model.get_parameter(full_layer_name)}


def _shape(layer: Any) -> tuple[int, int]:
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def _install(model: nn.Module, name: str, layer: QuantLinear, config: FerroloraConfig) -> None:
    layer.conv1d = isinstance(model.get_submodule(name), Conv1D)
    if config.compute_dtype is not None:
        layer.compute_dtype = FLOAT_TYPES[config.compute_dtype]
    model.set_submodule(name, layer.train(model.training))
