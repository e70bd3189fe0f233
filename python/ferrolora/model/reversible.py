"""Putting MEFT's stack in the place of a model's decoder layers, and taking it out again."""

from torch import nn

from ferrolora.adapters.reversible import ReversibleConfig, ReversibleStack
from ferrolora.errors import TargetError


def inject_stack(model: nn.Module, name: str, config: ReversibleConfig) -> None:
    """Adds reversible adapter `name`. Fills in `config.layers`.

    Raises:
        TargetError: the list of layers is not found, or is not the only one.
    """
    if config.layers is None:
        config.layers = _find_layers(model)
    holder = model.get_submodule(config.layers)
    if not isinstance(holder, nn.ModuleList):
        raise TargetError(f"ReversibleConfig: {config.layers} is a {type(holder).__name__}, not an nn.ModuleList")
    if len(holder) == 1 and isinstance(holder[0], ReversibleStack):
        stack = holder[0]
    else:
        stack = ReversibleStack(nn.ModuleList(holder), _width(model))
    stack.add_adapter(name, config, config.layers, True)
    _refill(holder, [stack])


def remove_stacks(model: nn.Module) -> None:
    """Puts the layers back into their lists."""
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList) and len(module) == 1 and isinstance(module[0], ReversibleStack):
            _refill(module, list(module[0].layers))


def _refill(holder: nn.ModuleList, modules: list[nn.Module]) -> None:
    holder._modules.clear()
    for index, module in enumerate(modules):
        holder.add_module(str(index), module)


def _find_layers(model: nn.Module) -> str:
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and (len(module) == count or (len(module) == 1 and isinstance(module[0], ReversibleStack)))
        and not path.endswith(".base_layer")
    ]
    if len(found) != 1:
        raise TargetError(f"ReversibleConfig: {len(found)} lists of {count} layers ({found}); give layers=<path>")
    return str(found[0])


def _width(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise TargetError("ReversibleConfig: the model's config has no hidden_size")
    return width
