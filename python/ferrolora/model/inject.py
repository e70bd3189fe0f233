"""Putting adapters into a model, and the shell that holds the model."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ferrolora.adapters.base import AdapterLayer
from ferrolora.adapters.config import ModuleConfig, PeftConfig
from ferrolora.adapters.lora_experts import wrap_parameters
from ferrolora.adapters.modules_to_save import ModulesToSaveWrapper
from ferrolora.adapters.registry import method_of
from ferrolora.adapters.rows import RowGroups
from ferrolora.adapters.tokens import TrainableTokens
from ferrolora.errors import FerroloraError, TargetError, UnsupportedError
from ferrolora.model.float_weights import FloatWeights
from ferrolora.model.targets import ALL_LINEAR, find_parameters, find_targets, saved_modules, smallest_suffixes

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


def inject_adapter(
    model: nn.Module,
    name: str,
    config: ModuleConfig,
    autocast_dtype: bool,
    weights: FloatWeights | None = None,
) -> None:
    """Adds adapter `name` to `model`, inactive and frozen. Fills `config` in with what was found.

    After this `config.target_modules` is the shortest list that means exactly the chosen modules: the file must not
    depend on what a default means elsewhere.

    Args:
        model: the base model.
        name: of the adapter.
        config: made concrete for the model.
        autocast_dtype: adapter weights are at least float32.
        weights: the float weights of a packed base, for initializers that start from them.

    Raises:
        TargetError: nothing matched, or a module cannot be adapted.
    """
    saved = saved_modules(model, config.modules_to_save)
    targets = find_targets(model, config, saved)
    modules = dict(model.named_modules())
    wrap = method_of(config.peft_type).wrap
    if wrap is None:
        raise UnsupportedError(f"{config.peft_type} does not adapt modules")
    layers = {path: _wrapped(modules[path], path, wrap, config) for path in targets}
    experts = {
        path: wrap_parameters(modules[path], names, path)
        for path, names in find_parameters(model, getattr(config, "target_parameters", None)).items()
    }
    parameters = {f"{path}.{leaf}": layer for path, inner in experts.items() for leaf, layer in inner.items()}
    adding: dict[str, AdapterLayer] = {**layers, **parameters}
    copies = {path: _copied(modules[path], path, name) for path in saved}
    tokens = _token_layers(model, config, set(targets) | set(saved))
    try:
        for path, layer in adding.items():
            layer.add_adapter(name, config, path, autocast_dtype, weights.source(path) if weights else None)
        for wrapper in copies.values():
            wrapper.add_adapter(name)
        for path, (rows, indices) in tokens.items():
            if indices:
                rows.add_tokens(name, indices, path, autocast_dtype)
    except FerroloraError:
        every: list[Wrapper] = [*adding.values(), *copies.values(), *(rows for rows, _ in tokens.values())]
        for added in every:
            added.delete_adapter(name)
        raise
    outermost = {path: list(inner.values())[-1] for path, inner in experts.items()}
    for path, placed in (layers | outermost | copies | {path: rows for path, (rows, _) in tokens.items()}).items():
        if modules[path] is not placed:
            replace_module(model, modules[path], placed)
    if config.target_modules is None or config.target_modules == ALL_LINEAR:
        config.target_modules = smallest_suffixes(model, targets)
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(getattr(layer, "transposed", False) for layer in layers.values())


def inject_saved_modules(model: nn.Module, name: str, names: Sequence[str] | None) -> None:
    """Gives adapter `name` its own trained copies of the modules that `names` means."""
    modules = dict(model.named_modules())
    for path in saved_modules(model, names):
        wrapper = _copied(modules[path], path, name)
        wrapper.add_adapter(name)
        if modules[path] is not wrapper:
            replace_module(model, modules[path], wrapper)


def _wrapped(
    module: nn.Module, path: str, wrap: Callable[[nn.Module, str, PeftConfig], AdapterLayer], config: PeftConfig
) -> AdapterLayer:
    if isinstance(module, TrainableTokens):
        raise UnsupportedError(f"{path}: rows of this embedding are trained (trainable_token_indices); it is no target")
    return module if isinstance(module, AdapterLayer) else wrap(module, path, config)


def _copied(module: nn.Module, path: str, name: str) -> ModulesToSaveWrapper:
    if isinstance(module, AdapterLayer):
        raise TargetError(f"{path} is in modules_to_save of adapter {name!r}, and another adapter adapts it")
    return module if isinstance(module, ModulesToSaveWrapper) else ModulesToSaveWrapper(module, path)


def _token_layers(
    model: nn.Module, config: ModuleConfig, taken: set[str]
) -> dict[str, tuple[TrainableTokens, Sequence[int]]]:
    """{path: (the wrapper of an embedding, token ids)}; a head tied to the embedding follows it, without ids."""
    asked = getattr(config, "trainable_token_indices", None)
    if not asked:
        return {}
    find_embedding = getattr(model, "get_input_embeddings", None)
    embedding = find_embedding() if callable(find_embedding) else None
    wanted = dict(asked) if isinstance(asked, Mapping) else {_path_of(model, embedding): list(asked)}
    found: dict[str, tuple[TrainableTokens, Sequence[int]]] = {}
    for key, indices in wanted.items():
        paths = [path for path, _ in model.named_modules() if path and (path == key or path.endswith(f".{key}"))]
        if len(paths) != 1:
            raise TargetError(f"trainable_token_indices: {key!r} names {len(paths)} modules of the model, not one")
        module = model.get_submodule(paths[0])
        if paths[0] in taken or not isinstance(module, (nn.Embedding, TrainableTokens)):
            raise TargetError(
                f"trainable_token_indices: {paths[0]} must be an nn.Embedding that is neither adapted nor in "
                f"modules_to_save, but it is a {type(module).__name__}"
            )
        rows = module if isinstance(module, TrainableTokens) else TrainableTokens(module)
        found[paths[0]] = (rows, indices)
        find_head = getattr(model, "get_output_embeddings", None)
        head = find_head() if callable(find_head) else None
        if isinstance(head, nn.Linear) and head.weight is rows.weight:
            found[_path_of(model, head)] = (TrainableTokens(head, tied_to=rows), [])
    return found


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    for path, module in model.named_modules():
        if wanted is not None and module is wanted:
            return str(path)
    raise TargetError("trainable_token_indices: the model names no input embedding; give {name: ids} instead")


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


def bias_choice(config: PeftConfig) -> str:
    """Which base biases an adapter trains: "none", "all" or "lora_only"."""
    return str(getattr(config, "bias", "none"))


def activate(model: nn.Module, names: Sequence[str], configs: Mapping[str, PeftConfig], trainable: bool) -> None:
    """Makes `names` the active adapters everywhere, trainable or frozen, and the biases they train with them."""
    for _, layer in wrappers(model):
        layer.activate(names, trainable)
    for config in configs.values():
        if bias_choice(config) != "none":
            for _, parameter in bias_parameters(model, bias_choice(config)):
                parameter.requires_grad_(False)
    for name in names:
        if bias_choice(configs[name]) != "none":
            for _, parameter in bias_parameters(model, bias_choice(configs[name])):
                parameter.requires_grad_(trainable)


@contextmanager
def row_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Within the context each row of a batch uses the adapter of its place in `names` ("__base__": none)."""
    groups = RowGroups(names)
    layers = [layer for _, layer in wrappers(model)]
    for layer in layers:
        layer.row_groups = groups
    try:
        yield
    finally:
        for layer in layers:
            layer.row_groups = None


def enable(model: nn.Module, enabled: bool, configs: Mapping[str, PeftConfig]) -> None:
    """Switches all adapters on or off; off gives the base's own output, but for biases that were trained in place."""
    if not enabled and any(bias_choice(config) != "none" for config in configs.values()):
        warnings.warn("the base's biases were trained (bias != 'none'), so this is not the base's output", stacklevel=3)
    for _, layer in wrappers(model):
        layer.adapters_enabled = enabled
