"""What `QuantLinear.weight` shows to code that knows nothing of packing: codes that are no numbers, or floats to read.

Libraries that merge or adapt layers compute with `layer.weight` and assign to `layer.weight.data`. Over packed codes
that gives wrong numbers, or none. Over these two tensors it is exact or an error; the registered parameter stays plain.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ferrolora.errors import UnsupportedError
from ferrolora.tensor import QuantTensor

_WRITING = (
    "the packed weight of a QuantLinear is frozen, so {what} cannot change it. A merge needs a float layer over "
    "dequantize(): merge_and_unload() makes one for our adapters, and for PEFT's after integrations.peft.accelerate; "
    "PEFT methods that compute with the weight need integrations.peft.prepare first"
)
_COMPUTING = (
    "{what} would take the packed weight of a QuantLinear for numbers; use dequantize(), or call "
    "ferrolora.nn.read_as_float(model) before other libraries put adapters into it"
)
_DATA: Any = Tensor.data
_SETTINGS = {"requires_grad_", "detach_", "share_memory_"}


def _changes(name: str) -> bool:
    """Whether a method of this name changes its tensor in place."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name not in _SETTINGS)


class PackedCodes(Tensor):
    """The packed weight, sharing its memory: it can be moved, copied and inspected, but not computed with.

    An operation with a float tensor beside it, with a float result, or that changes it raises UnsupportedError.
    """

    _is_param = True  # isinstance(…, nn.Parameter), as for the parameter

    @classmethod
    def over(cls, codes: nn.Parameter) -> "PackedCodes":
        """The guarded alias of a parameter; the attributes that other code hangs on either are on both."""
        alias = codes.detach().as_subclass(cls)
        alias.__dict__ = codes.__dict__
        return alias

    def parameter(self) -> nn.Parameter:
        """A plain parameter over the same memory, with the same attributes."""
        codes = nn.Parameter(self.as_subclass(Tensor), requires_grad=False)
        codes.__dict__ = self.__dict__
        return codes

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        first = args[0] if args else next(iter(kwargs.values()))
        if func == _DATA.__set__ or isinstance(kwargs.get("out"), cls) or (_changes(name) and isinstance(first, cls)):
            raise UnsupportedError(_WRITING.format(what="assigning .data" if func == _DATA.__set__ else name))
        with torch._C.DisableTorchFunctionSubclass():
            beside = any(map(_is_float, tree_leaves((args, kwargs))))
            result = None if beside else func(*args, **kwargs)
            if name.startswith("new_") or name.endswith("_like"):
                return result
            if beside or any(map(_is_float, tree_leaves(result))):
                raise UnsupportedError(_COMPUTING.format(what=name))
            return tree_map_only(Tensor, lambda tensor: tensor.as_subclass(cls), result)  # a copy is codes too


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


class FloatReading(Tensor):
    """deq(W), or a view of it: it looks like a float weight, holds no memory and is decoded at every use.

    Anything that would change it raises UnsupportedError.
    """

    _is_param = True  # isinstance(…, nn.Parameter), as for a float layer's weight
    decode: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, decode: Callable[[], Tensor], like: Tensor, device: torch.device) -> "FloatReading":
        """`decode` gives the values, `like` has their shape, strides and type (a tensor on the meta device does)."""
        made: FloatReading = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )
        made.decode = decode
        return made

    @classmethod
    def of(cls, weight: QuantTensor) -> "FloatReading":
        """The whole weight, in its compute type."""
        return cls(weight.dequantize, torch.empty(weight.shape, dtype=weight.dtype, device="meta"), weight.device)

    @property
    def data(self) -> "FloatReading":
        """Itself: there is no autograd history to leave behind."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise UnsupportedError(_WRITING.format(what="assigning .data"))

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]  # torch names a keyword for printing
        return f"FloatReading({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has the disabled one
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, cls):
                raise UnsupportedError(_WRITING.format(what=func.__name__))

        def decoded() -> Any:
            plain_args, plain_kwargs = tree_map_only(cls, lambda reading: reading.decode(), (args, kwargs))
            return func(*plain_args, **plain_kwargs)

        if isinstance(args[0], cls) and any(value.alias_info is not None for value in func._schema.returns):
            return _view(args[0], func, args[1:], kwargs, decoded)  # not a copy: writing to it must be refused as well
        return decoded()


def _view(reading: FloatReading, func: Any, args: tuple[Any, ...], kwargs: Any, decoded: Callable[[], Any]) -> Any:
    """What a view operation gives on a reading: readings."""
    meta = torch.empty_strided(reading.shape, reading.stride(), dtype=reading.dtype, device="meta")
    views = func(meta, *args, **kwargs)
    if isinstance(views, Tensor):
        return FloatReading(decoded, views, reading.device)
    return [FloatReading(partial(_part, decoded, i), view, reading.device) for i, view in enumerate(views)]


def _part(decoded: Callable[[], Any], index: int) -> Tensor:
    part: Tensor = decoded()[index]
    return part
