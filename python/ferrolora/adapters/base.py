"""The wrapper that every adapter method puts around a module: several adapters by name, some active, some merged."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ferrolora.adapters.config import PeftConfig
from ferrolora.errors import TargetError, UnsupportedError


class AdapterLayer(nn.Module, ABC):
    """A module with adapters beside it; a subclass says what an adapter adds.

    The wrapped module is `base_layer`. The parameters of adapter `a` lie under `<container>.a` for each container of
    the class, as PEFT has them, so that a file key is the path without `.a`. `base_layer` is only called, never
    looked into: what it offers (`forward_with_low_rank`, `dequantize`) decides how it is used.
    """

    containers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.adapters_enabled = True
        # The parameters that a merge replaced. In a tuple of a plain dict: a module attribute would register them.
        self._unmerged: dict[str, tuple[nn.Parameter]] = {}

    @abstractmethod
    def add_adapter(self, name: str, config: PeftConfig, path: str, autocast_dtype: bool) -> None:
        """Creates the parameters of adapter `name` for this module, which lies at `path` in the model."""

    @abstractmethod
    def delta_weight(self, name: str) -> Tensor:
        """What adapter `name` adds to the base weight, in the weight's own layout, float32 or wider."""

    def delta_bias(self, name: str) -> Tensor | None:
        """What adapter `name` adds to the base bias, or None."""
        return None

    def keep_beside(self, names: Sequence[str]) -> None:
        """Merges into a base whose weight cannot be written to: freezes the delta and keeps it as buffers."""
        kind = type(self.base_layer).__name__
        raise UnsupportedError(f"{type(self).__name__} cannot merge into a {kind}: its weight is not a float tensor")

    def drop_beside(self) -> None:
        """Undoes `keep_beside`."""

    # -- what is there ---------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The base weight; models read its dtype and device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base bias, or None."""
        return getattr(self.base_layer, "bias", None)

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

    def adapter_names(self) -> list[str]:
        """The adapters this module has, in the order in which they were added."""
        return list(dict.fromkeys(name for container in self.containers for name in getattr(self, container)))

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter; none if this module does not have it."""
        for container in self.containers:
            entries = getattr(self, container)
            if name in entries:
                entry = entries[name]
                yield from [entry] if isinstance(entry, nn.Parameter) else entry.parameters()

    # -- which adapters count --------------------------------------------------------------------------------------

    def activate(self, names: Sequence[str], trainable: bool) -> None:
        """Makes exactly those of `names` active that this module has; only active ones can be trained."""
        present = self.adapter_names()
        self.active_adapters = [name for name in names if name in present]
        for name in present:
            for parameter in self.adapter_parameters(name):
                parameter.requires_grad_(trainable and name in self.active_adapters)

    def delete_adapter(self, name: str) -> None:
        """Removes adapter `name` if this module has it. Raises UnsupportedError while it is merged."""
        if name in self.merged_adapters:
            raise UnsupportedError(f"adapter {name!r} is merged; call unmerge_adapter() before deleting it")
        for container in self.containers:
            getattr(self, container).pop(name) if name in getattr(self, container) else None
        self.active_adapters = [active for active in self.active_adapters if active != name]

    # -- merging ---------------------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """Whether the base weight is an ordinary float tensor, into which a delta can be added."""
        return self.weight.is_floating_point() and self.weight.itemsize > 1

    def merge(self, names: Sequence[str]) -> None:
        """W ← W + Σ ΔW (summed in float32 or wider, rounded once). The replaced W is kept, so that unmerge is exact.

        A base whose weight is not a float tensor keeps its bytes, and ΔW stays beside it.

        Raises:
            UnsupportedError: something is merged already, or a delta on the bias has no bias to go to.
        """
        if self.merged:
            raise UnsupportedError(f"{self.merged_adapters} are merged already; call unmerge_adapter() first")
        present = [name for name in names if name in self.adapter_names()]
        if not present:
            return
        if self.writable:
            self._replace("weight", self._sum(self.weight, [self.delta_weight(name) for name in present]))
            biases = [delta for delta in map(self.delta_bias, present) if delta is not None]
            if biases:
                self._replace("bias", self._sum(self._needed_bias(), biases))
        else:
            self.keep_beside(present)
        self.merged_adapters = present

    def unmerge(self) -> None:
        """Puts back what `merge` replaced, bit for bit."""
        for field, (parameter,) in self._unmerged.items():
            current = getattr(self.base_layer, field)
            if parameter.device != current.device or parameter.dtype != current.dtype:
                parameter.data = parameter.data.to(current.device, current.dtype)
            setattr(self.base_layer, field, parameter)
        self._unmerged = {}
        self.drop_beside()
        self.merged_adapters = []

    @torch.no_grad()
    def merged_module(self, names: Sequence[str], dtype: torch.dtype | None) -> nn.Module:
        """The base module with the deltas of `names` in its weight, and no wrapper.

        Args:
            names: adapters to merge; those this module does not have are passed over.
            dtype: float type of the result; None keeps a float base's own, and a packed base's compute type.
        """
        present = [name for name in names if name in self.adapter_names()]
        deltas = [self.delta_weight(name) for name in present]
        biases = [delta for delta in map(self.delta_bias, present) if delta is not None]
        module = self.base_layer if self.writable else dense_linear(self.base_layer, torch.float32)
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        target = dtype or (weight.dtype if self.writable else sixteen_bit(self.base_layer))
        module.weight = nn.Parameter(self._sum(weight, deltas, target), weight.requires_grad)
        if bias is not None or biases:
            total = self._sum(bias if bias is not None else self._needed_bias(), biases, target)
            module.bias = nn.Parameter(total, bias is not None and bias.requires_grad)
        return module

    @staticmethod
    @torch.no_grad()
    def _sum(start: Tensor, deltas: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        total = start.to(torch.promote_types(start.dtype, torch.float32), copy=True)
        for delta in deltas:
            total += delta.to(total.device)
        return total.to(dtype or start.dtype)

    def _replace(self, field: str, value: Tensor) -> None:
        old = getattr(self.base_layer, field)
        self._unmerged[field] = (old,)
        setattr(self.base_layer, field, nn.Parameter(value, old.requires_grad))

    def _needed_bias(self) -> Tensor:
        if self.bias is None:
            kind = type(self.base_layer).__name__
            raise UnsupportedError(f"lora_bias=True cannot be merged into a {kind} without a bias")
        return self.bias


def dense_linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """An `nn.Linear` with the values of a packed linear that offers `dequantize(dtype)`.

    Raises:
        UnsupportedError: the module offers no `dequantize`.
    """
    dequantize: Callable[[torch.dtype], Tensor] | None = getattr(module, "dequantize", None)
    if not isinstance(module, nn.Linear) or dequantize is None or module.weight.is_floating_point():
        raise UnsupportedError(f"a {type(module).__name__} offers no dequantize(), so nothing can be merged into it")
    with torch.device("meta"):
        dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    dense.weight = nn.Parameter(dequantize(dtype), requires_grad=False)
    if module.bias is not None:
        dense.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return dense.train(module.training)


def sixteen_bit(module: nn.Module) -> torch.dtype:
    """The 16-bit type a packed module computes in, or bfloat16 when it computes in float32."""
    dtype = getattr(module, "compute_dtype", None)
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16


def adapter_dtype(base_layer: nn.Module, autocast_dtype: bool) -> torch.dtype:
    """The type of new adapter parameters: the base's own, but at least float32 when `autocast_dtype`."""
    weight: Any = base_layer.weight
    dtype = weight.dtype if weight.is_floating_point() else getattr(base_layer, "compute_dtype", None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize == 1:
        return torch.float32
    return torch.promote_types(dtype, torch.float32) if autocast_dtype else dtype


def check_adapter_name(name: str) -> None:
    """Raises TargetError for a name that cannot be a folder and a part of a parameter's name."""
    if not name or "." in name or "/" in name or hasattr(nn.ModuleDict, name):
        raise TargetError(f"{name!r} cannot name an adapter: it must be a plain word without '.' and '/'")
