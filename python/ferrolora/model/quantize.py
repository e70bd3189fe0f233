"""Quantizing the linear layers and fused experts of a model that is already loaded."""

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ferrolora.adapters.base import AdapterLayer
from ferrolora.adapters.lora import is_transposed_linear
from ferrolora.errors import TargetError, UnsupportedError
from ferrolora.model.targets import is_inside, matches, output_head_names, task_head_names
from ferrolora.nn import QuantLinear
from ferrolora.nn.experts import QuantExperts, check_layout, is_fused_experts
from ferrolora.spec import QuantSpec

_DEFAULT = QuantSpec()


def quantize_model(
    model: nn.Module, spec: QuantSpec = _DEFAULT, skip_modules: Sequence[str] | None = None
) -> nn.Module:
    """Replaces the linear layers and fused experts of `model` by quantized ones, in place, one after the other.

    Never quantized: the output head, task heads, a layer whose weight another module shares, and what a
    transformers model keeps in float32.

    Args:
        model: a model with float weights.
        spec: the codec. Default nf4, blocks of 64, double quantization.
        skip_modules: further names to leave alone: whole names, `.suffix`es, or modules around them. Default none.

    Returns:
        `model`.

    Raises:
        TargetError: there is nothing to quantize, or the model has adapters already.
        UnsupportedError: a Conv1D, or experts of a layout that has no quantized form, would be left in float unsaid;
            skip it by name.
        QuantizationError: a weight holds NaN or infinity; names the layer.
    """
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise TargetError("quantize_model needs the base model: quantize it before adding adapters")
    chosen = _quantizable(model, skip_modules or ())
    if not chosen:
        raise TargetError(f"quantize_model found no float nn.Linear to quantize outside {skip_modules or 'the heads'}")
    for path in chosen:
        parent, _, leaf = path.rpartition(".")
        layer = model.get_submodule(path)
        packed: nn.Module
        if isinstance(layer, nn.Linear):
            packed = QuantLinear.from_linear(layer, spec, name=f"{path}.weight")
        else:
            packed = QuantExperts.from_experts(layer, spec, name=path)
        setattr(model.get_submodule(parent), leaf, packed)
    return model


def _quantizable(model: nn.Module, skip: Sequence[str]) -> list[str]:
    heads = output_head_names(model) | task_head_names(model)
    kept_float = [*(getattr(model, "_keep_in_fp32_modules", None) or ()), *skip]
    shared = _shared_parameters(model)
    chosen: list[str] = []
    skipped: list[str] = []
    for path, module in model.named_modules():
        if path and (is_inside(path, [*heads, *skipped]) or matches(kept_float, path)):
            skipped.append(path)
        elif is_transposed_linear(module):
            raise UnsupportedError(f"{path} is a Conv1D, which has no quantized form; name it in skip_modules")
        elif is_fused_experts(module):
            check_layout(module, path)
            chosen.append(path)
        elif _is_float_linear(module) and id(module.weight) not in shared:
            chosen.append(path)
    return chosen


def _is_float_linear(module: nn.Module) -> bool:
    packed = isinstance(module, (QuantLinear, NonDynamicallyQuantizableLinear))
    return isinstance(module, nn.Linear) and not packed and module.weight.is_floating_point()


def _shared_parameters(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared
