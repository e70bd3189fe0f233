"""What happens to the tensors of one linear layer, or of a layer's experts, as transformers loads a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from ferrolora.errors import FormatError
from ferrolora.integrations.transformers import FLOAT_TYPES, FerroloraConfig
from ferrolora.nn import QuantLinear
from ferrolora.nn.expert_stack import QuantStack, quantize_stack, stack_from_state
from ferrolora.nn.experts import QuantExperts, is_fused_experts
from ferrolora.nn.quant_state import from_state


class QuantizeWeight(ConversionOps):
    """A float weight arrives: quantize it and put a `QuantLinear` or `QuantExperts` in the place of its module.

    Args:
        config: how to quantize.
        arrived: gets the names of the weights of experts that came.
    """

    def __init__(self, config: FerroloraConfig, arrived: set[str]) -> None:
        self._config = config
        self._arrived = arrived

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        """`{"<layer>.weight": float [N, K]}`, or `[E, N, K]` of experts, to the packed weight under the same name."""
        model: nn.Module = context["model"]
        packed = {}
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name, _, leaf = key.rpartition(".")
            layer: Any = model.get_submodule(name)
            if leaf != "weight":
                stack = quantize_stack(weight, self._config.spec, key)
                packed[key] = _install_experts(model, key, stack, self._config, self._arrived)
                continue
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


class ReadExperts(ConversionOps):
    """The tensors of one projection of packed experts arrive: check them and put a `QuantExperts` in their place.

    Args:
        config: of the checkpoint.
        arrived: gets the name of the weight.
    """

    def __init__(self, config: FerroloraConfig, arrived: set[str]) -> None:
        self._config = config
        self._arrived = arrived

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadExperts:
        """One for all converters: transformers copies them for each weight, and `arrived` must stay the same set."""
        return self

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **context: Any
    ) -> dict[str, Any]:
        """`{"gate_up_proj_codes": …, "gate_up_proj_absmax": …, …}` to the packed weight under its full name."""
        key: str = context["full_layer_name"]
        mark = f"{key.rpartition('.')[2]}_"
        state = {
            part.removeprefix(mark): value[0] if isinstance(value, list) else value
            for part, value in input_dict.items()
        }
        stack = stack_from_state(state, key)
        return {key: _install_experts(context["model"], key, stack, self._config, self._arrived)}


def _install_experts(
    model: nn.Module, key: str, stack: QuantStack, config: FerroloraConfig, arrived: set[str]
) -> nn.Parameter:
    name, _, projection = key.rpartition(".")
    module = model.get_submodule(name)
    if is_fused_experts(module):
        module = QuantExperts(module, stack.spec).train(model.training)
        module.compute_dtype = FLOAT_TYPES[config.compute_dtype] if config.compute_dtype else stack.dtype
        model.set_submodule(name, module)
    if not isinstance(module, QuantExperts):
        raise FormatError(f"{key} holds packed experts, but {name} of this model is a {type(module).__name__}")
    module.install(projection, stack)
    arrived.add(key)
    return module.get_parameter(projection)


def _shape(layer: Any) -> tuple[int, int]:
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)


def _install(model: nn.Module, name: str, layer: QuantLinear, config: FerroloraConfig) -> None:
    layer.conv1d = isinstance(model.get_submodule(name), Conv1D)
    if config.compute_dtype is not None:
        layer.compute_dtype = FLOAT_TYPES[config.compute_dtype]
    model.set_submodule(name, layer.train(model.training))
