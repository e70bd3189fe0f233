"""Which modules of a model an adapter goes into."""

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ferrolora.adapters.base import AdapterLayer
from ferrolora.adapters.config import ModuleConfig, TaskType
from ferrolora.adapters.lora import is_transposed_linear
from ferrolora.adapters.lora_experts import LoraExperts
from ferrolora.adapters.modules_to_save import ModulesToSaveWrapper
from ferrolora.errors import TargetError, UnsupportedError
from ferrolora.nn.experts import PROJECTIONS, QuantExperts, check_layout, is_fused_experts

ALL_LINEAR = "all-linear"

# The heads that transformers initialises anew when a base checkpoint is loaded for a task.
TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
HEAD_NAMES = tuple(dict.fromkeys(name for names in TASK_HEADS.values() for name in names))


def matches(names: str | Sequence[str], path: str) -> bool:
    """Whether `path` is meant: a string must match it whole as a regular expression; a list by name or `.suffix`."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def output_head_names(model: nn.Module) -> set[str]:
    """Paths of the output head that the model itself names (`get_output_embeddings`), if any."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return {path for path, module in model.named_modules() if head is not None and module is head}


def task_head_names(model: nn.Module, heads: Iterable[str] = HEAD_NAMES) -> set[str]:
    """Paths of top-level modules whose name ends in one of `heads` ("classifier" also finds "pre_classifier")."""
    return {path for path, _ in model.named_children() if path.endswith(tuple(heads))}


def saved_modules(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Paths of the modules that `modules_to_save` means: the name ends in one of them, as in PEFT.

    A module inside another chosen one, or inside a wrapper, is not listed.
    """
    chosen: list[str] = []
    for path in _plain_names(model):
        if names and path.endswith(tuple(names)) and not is_inside(path, chosen):
            chosen.append(path)
    return chosen


def find_targets(model: nn.Module, config: ModuleConfig, saved: Sequence[str]) -> list[str]:
    """Paths of the modules that `config` wants adapted, in the model's order.

    Args:
        model: the base model.
        config: its target_modules, exclude_modules, layers_to_transform and layers_pattern are read.
        saved: paths of modules that are trained in full; nothing in them is adapted.

    Raises:
        TargetError: nothing matched; the message lists the nearest names.
    """
    names = [path for path in _plain_names(model) if not is_inside(path, saved)]
    target = config.target_modules
    if target is None or target == ALL_LINEAR:
        heads = output_head_names(model) | task_head_names(model)
        modules = dict(model.named_modules())
        found = [path for path in names if _is_linear(modules[path]) and not is_inside(path, heads)]
    else:
        found = [path for path in names if matches(target, path)]
    if config.exclude_modules:
        found = [path for path in found if not matches(config.exclude_modules, path)]
    found = [path for path in found if _in_layers(path, config)]
    if not found and not getattr(config, "target_parameters", None):
        raise TargetError(_nothing_matched(config, names))
    return found


def find_parameters(model: nn.Module, names: Sequence[str] | None) -> dict[str, list[str]]:
    """{path of fused experts: their parameters that `names` means}, whole names or `.suffix`es, in the model's order.

    Raises:
        TargetError: nothing matched; the message lists the parameters that could be meant.
        UnsupportedError: a parameter that is not a matrix of fused experts.
    """
    found: dict[str, list[str]] = {}
    known: list[str] = []
    if not names:
        return found
    modules = dict(model.named_modules())
    for path in _plain_names(model):
        module = modules[path]
        owner = module.experts if isinstance(module, LoraExperts) else module
        fused = isinstance(owner, QuantExperts) or is_fused_experts(owner)
        for leaf, _ in owner.named_parameters(recurse=False):
            key = f"{path}.{leaf}"
            if fused and leaf in PROJECTIONS:
                known.append(key)
            if not matches(list(names), key):
                continue
            if not fused:
                raise UnsupportedError(
                    f"target_parameters: {key} belongs to a {type(owner).__name__}; they are for fused experts, "
                    "and a linear layer is adapted by naming it in target_modules"
                )
            if is_fused_experts(owner):
                check_layout(owner, path)
            found.setdefault(path, []).append(leaf)
    if not found:
        raise TargetError(
            f"target_parameters={list(names)} matched no parameter of the model; it has "
            f"{', '.join(sorted({'.'.join(key.split('.')[-2:]) for key in known})) or 'no fused experts'}"
        )
    return found


def smallest_suffixes(model: nn.Module, chosen: Sequence[str]) -> list[str]:
    """The shortest list of name suffixes that means exactly `chosen`, for the file: `["q_proj", "v_proj"]`."""
    wanted, suffixes = set(chosen), dict[str, None]()
    names = _plain_names(model)
    for path in chosen:
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            suffix = ".".join(parts[-count:])
            if all(name in wanted for name in names if matches([suffix], name)):
                suffixes[suffix] = None
                break
        else:
            suffixes[path] = None
    return sorted(suffixes)


def is_inside(path: str, modules: Iterable[str]) -> bool:
    """Whether `path` is one of `modules` or lies in one."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _plain_names(model: nn.Module) -> list[str]:
    """Names of the model's own modules: what a wrapper holds is not among them, the wrapper itself is."""
    names: list[str] = []
    wrapped: list[str] = []
    for path, module in model.named_modules():
        if not path or is_inside(path, wrapped):
            continue
        names.append(path)
        if isinstance(module, (AdapterLayer, ModulesToSaveWrapper)):
            wrapped.append(path)
    return names


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, AdapterLayer):
        return _is_linear(module.base_layer)
    is_linear = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return is_linear or is_transposed_linear(module)


def _in_layers(path: str, config: ModuleConfig) -> bool:
    wanted = getattr(config, "layers_to_transform", None)
    if wanted is None:
        return True
    indices = [wanted] if isinstance(wanted, int) else wanted
    patterns = getattr(config, "layers_pattern", None) or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)  # the first index: experts may hold another
        if match:
            return int(match.group(1)) in indices
    return False


def _nothing_matched(config: ModuleConfig, names: Sequence[str]) -> str:
    target = config.target_modules
    asked = [target] if isinstance(target, str) else list(target or [ALL_LINEAR])
    leaves = sorted({path.rpartition(".")[2] for path in names if not path.rpartition(".")[2].isdigit()})
    last = [name.rpartition(".")[2].strip("*()$^\\") for name in asked]
    near = [leaf for name in last for leaf in difflib.get_close_matches(name, leaves, n=5, cutoff=0.4)]
    limits = {
        key: getattr(config, key)
        for key in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        if getattr(config, key, None)
    }
    but = f" with {limits}" if limits else ""
    listed = ", ".join(list(dict.fromkeys(near)) or leaves[:20])
    return f"target_modules={target!r}{but} matched no module of the model; the nearest names are: {listed}"
