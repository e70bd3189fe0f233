"""Putting adapters into a model, and the shell that holds the model."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from ferrolora.adapters.base import AdapterLayer
from ferrolora.adapters.lora import LoraConfig
from ferrolora.adapters.modules_to_save import ModulesToSaveWrapper
from ferrolora.adapters.registry import method_of
from ferrolora.errors import FerroloraError, TargetError
from ferrolora.model.targets import ALL_LINEAR, find_targets, saved_modules, smallest_suffixes

Wrapper = AdapterLayer | ModulesToSaveWrapper


class AdaptedModel(nn.Module):
    """Holds the base as `model`, so that parameters are named `base_model.model.<path>` as they are in PEFT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the base returns."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet while unpickling
                raise
            return getattr(self.model, name)


def wrappers(model: nn.Module) -> Iterator[tuple[str, Wrapper]]:
    """Every adapter layer and every fully trained module of the model, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, (AdapterLayer, ModulesToSaveWrapper)):
            yield path, module


def inject_adapter(model: nn.Module, name: str, config: LoraConfig, autocast_dtype: bool) -> None:
    """Adds adapter `name` to `model`, inactive and frozen. Fills `config` in with what was found.

    After this `config.target_modules` is the shortest list that means exactly the chosen modules: the file must not
    depend on what a default means elsewhere.

    Raises:
        TargetError: nothing matched, or a module cannot be adapted.
    """
    saved = saved_modules(model, config.modules_to_save)
    targets = find_targets(model, config, saved)
    modules = dict(model.named_modules())
    wrap = method_of(config.peft_type).wrap
    layers = {path: _wrapped(modules[path], path, wrap) for path in targets}
    copies = {path: _copied(modules[path], path, name) for path in saved}
    try:
        for path, layer in layers.items():
            layer.add_adapter(name, config, path, autocast_dtype)
        for wrapper in copies.values():
            wrapper.add_adapter(name)
    except FerroloraError:
        every: list[Wrapper] = [*layers.values(), *copies.values()]
        for added in every:
            added.delete_adapter(name)
        raise
    for path, placed in (layers | copies).items():
        if modules[path] is not placed:
            replace_module(model, modules[path], placed)
    if config.target_modules is None or config.target_modules == ALL_LINEAR:
        config.target_modules = smallest_suffixes(model, targets)
    config.fan_in_fan_out = any(getattr(layer, "transposed", False) for layer in layers.values())


def _wrapped(module: nn.Module, path: str, wrap: Callable[[nn.Module, str], AdapterLayer]) -> AdapterLayer:
    return module if isinstance(module, AdapterLayer) else wrap(module, path)


def _copied(module: nn.Module, path: str, name: str) -> ModulesToSaveWrapper:
    if isinstance(module, AdapterLayer):
        raise TargetError(f"{path} is in modules_to_save of adapter {name!r}, and another adapter adapts it")
    return module if isinstance(module, ModulesToSaveWrapper) else ModulesToSaveWrapper(module, path)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever the model holds `old` (a shared embedding has several names)."""
    places = [
        (parent, name)
        for parent in model.modules()
        if parent is not new
        for name, child in parent._modules.items()  # named_children() gives a shared module once
        if child is old
    ]
    for parent, name in places:
        setattr(parent, name, new)


def train_only_adapters(model: nn.Module) -> None:
    """Freezes everything that is not in an adapter; adapters keep their own state."""
    own = {id(p) for _, layer in wrappers(model) for a in layer.adapter_names() for p in layer.adapter_parameters(a)}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)


def bias_parameters(model: nn.Module, choice: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The base biases that `LoraConfig.bias` means, with their paths: all of them, or those of adapted layers."""
    inside = {id(p) for _, layer in wrappers(model) for a in layer.adapter_names() for p in layer.adapter_parameters(a)}
    adapted = {f"{path}.base_layer.bias" for path, layer in wrappers(model) if isinstance(layer, AdapterLayer)}
    shadowed = [f"{path}.original_module" for path, layer in wrappers(model) if isinstance(layer, ModulesToSaveWrapper)]
    for path, parameter in model.named_parameters():
        is_bias = path == "bias" or path.endswith(".bias")
        replaced = any(path.startswith(f"{prefix}.") for prefix in shadowed)
        if is_bias and id(parameter) not in inside and not replaced and (choice == "all" or path in adapted):
            yield path, parameter


def activate(model: nn.Module, names: Sequence[str], configs: dict[str, LoraConfig], trainable: bool) -> None:
    """Makes `names` the active adapters everywhere, trainable or frozen, and the biases they train with them."""
    for _, layer in wrappers(model):
        layer.activate(names, trainable)
    for config in configs.values():
        if config.bias != "none":
            for _, parameter in bias_parameters(model, config.bias):
                parameter.requires_grad_(False)
    for name in names:
        if configs[name].bias != "none":
            for _, parameter in bias_parameters(model, configs[name].bias):
                parameter.requires_grad_(trainable)


def enable(model: nn.Module, enabled: bool, configs: dict[str, LoraConfig]) -> None:
    """Switches all adapters on or off; off gives the base's own output, but for biases that were trained in place."""
    if not enabled and any(config.bias != "none" for config in configs.values()):
        warnings.warn("the base's biases were trained (bias != 'none'), so this is not the base's output", stacklevel=3)
    for _, layer in wrappers(model):
        layer.adapters_enabled = enabled
