"""The class of a `PeftModel` whose base is a transformers model: it is a `PreTrainedModel` too.

`transformers.Trainer` saves and resumes a model through `save_pretrained` only if it is a `PreTrainedModel`. Whatever
that class offers and `PeftModel` does not define is answered by the base model, so that nothing of it is doubled.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def surface_class(kind: type[nn.Module], model: nn.Module | None) -> type[nn.Module]:
    """`kind` itself, or `kind` that is a `PreTrainedModel` too when `model` is one.

    Args:
        kind: `PeftModel` or one of its task classes.
        model: the base model.
    """
    transformers = sys.modules.get("transformers")  # never imported here: no base of it can exist without
    if transformers is None or model is None or not isinstance(model, transformers.PreTrainedModel):
        return kind
    return _pretrained_class(kind, type(model))


_MADE: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}  # one class a pair, as isinstance expects


def _pretrained_class(kind: type[nn.Module], base_class: type[nn.Module]) -> type[nn.Module]:
    if (kind, base_class) not in _MADE:
        _MADE[kind, base_class] = _make_class(kind, base_class)
    return _MADE[kind, base_class]


def _make_class(kind: type[nn.Module], base_class: type[nn.Module]) -> type[nn.Module]:
    from transformers import PreTrainedModel

    own = {name for ancestor in kind.__mro__ for name in vars(ancestor)}
    inherited = {name for ancestor in PreTrainedModel.__mro__ for name in vars(ancestor)}
    namespace: dict[str, Any] = {
        name: _from_base(name) for name in inherited - own if not (name.startswith("__") and name.endswith("__"))
    }
    namespace |= {
        "__module__": kind.__module__,
        "__reduce_ex__": _reduce_ex,
        "_base_class": base_class,
        "_kind": kind,
        "base_model": property(lambda self: self._modules["base_model"]),
        "config_class": getattr(base_class, "config_class", None),
        "forward": _forward_like(base_class),
        # Trainer's label smoother looks the model up by this name to know whether its labels are to be shifted
        "_get_name": lambda self: base_class.__name__,
    }
    return type(f"{kind.__name__}[{base_class.__name__}]", (kind, PreTrainedModel), namespace)


def _from_base(name: str) -> property:
    def get(self: Any) -> Any:
        return getattr(self.get_base_model(), name)

    def set_(self: Any, value: Any) -> None:
        setattr(self.get_base_model(), name, value)

    return property(get, set_)


def _forward_like(base_class: type[nn.Module]) -> Callable[..., Any]:
    """A forward that shows the base's parameters: Trainer reads them to choose columns and labels."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    forward.__signature__ = inspect.signature(base_class.forward)  # type: ignore[attr-defined]
    return forward


def _reduce_ex(self: Any, protocol: Any) -> Any:
    return _rebuild, (self._kind, self._base_class), self.__dict__


def _rebuild(kind: type[nn.Module], base_class: type[nn.Module]) -> nn.Module:
    made = _pretrained_class(kind, base_class)
    empty: nn.Module = object.__new__(made)
    return empty
