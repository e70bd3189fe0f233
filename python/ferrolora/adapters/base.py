"""The wrapper that every adapter method puts around a module: several adapters by name, some active, some merged."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ferrolora.adapters.config import PeftConfig
from ferrolora.adapters.rows import RowGroups, forward_groups
from ferrolora.errors import TargetError, UnsupportedError

WeightSource = Callable[[], Tensor]  # the float weight of a module before it was quantized
Entry = nn.Parameter | nn.Module


class AdapterLayer(nn.Module, ABC):
    """A module with adapters beside it; a subclass says what an adapter does.

    The wrapped module is `base_layer`. The parameters of adapter `a` lie under `<container>.a` for each container of
    the class, as PEFT has them, so that a file key is the path without `.a`. `base_layer` is only called, never
    looked into: what it offers (`forward_with_low_rank`, `dequantize`, `with_weight`) decides how it is used.
    """

    containers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active_adapters: list[str] = []
        self.merged_adapters: list[str] = []
        self.adapters_enabled = True
        self.row_groups: RowGroups | None = None  # set while a batch mixes adapters
        # The parameters that a merge replaced. In a tuple of a plain dict: a module attribute would register them.
        self._unmerged: dict[str, tuple[nn.Parameter]] = {}
        # Frozen copies of merged adapters over a base that cannot be written to: {(container, name): entry}.
        self._beside: dict[tuple[str, str], Entry] = {}

    @abstractmethod
    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        """Creates the parameters of adapter `name` for this module, which lies at `path` in the model.

        `source` gives the float weight to initializers that start from it; None: the base's own.
        """

    @abstractmethod
    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The module's output with the adapters `names`, at least one of them."""

    @abstractmethod
    def weight_with(self, names: Sequence[str], weight: Tensor) -> Tensor:
        """The base weight, given in its own layout in float32 or wider, with the adapters `names` in it."""

    def bias_with(self, names: Sequence[str], bias: Tensor | None) -> Tensor | None:
        """The base bias, given in float32 or wider, with the adapters `names` in it."""
        return bias

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """The module's output with the adapters that count: none, the merged, those of each row, or the active."""
        if not self.adapters_enabled or (self.merged and not self._beside):
            return cast(Tensor, self.base_layer(x))
        if self.merged:
            return self.adapted(x, self.merged_adapters)
        if self.row_groups is not None:
            return self.forward_rows(x, self.row_groups)
        return self.forward_as(x, self.active_adapters)

    def forward_rows(self, x: Tensor, groups: RowGroups) -> Tensor:
        """The module's output, each row with its own adapter."""
        return forward_groups(self, x, groups)

    def forward_as(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The module's output with those of `names` that it has."""
        present = [name for name in names if name in self.adapter_names()]
        return self.adapted(x, present) if present else cast(Tensor, self.base_layer(x))

    # -- what is there ---------------------------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The base weight; models read its dtype and device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base bias, or None."""
        return getattr(self.base_layer, "bias", None)

    def __getattr__(self, name: str) -> Any:
        """`stride`, `in_channels`, `embedding_dim`, … of the module inside: models read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "base_layer":  # hooks of the base are not ours; not there yet
                raise
            return getattr(self.base_layer, name)

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

    def adapter_names(self) -> list[str]:
        """The adapters this module has, in the order in which they were added."""
        return list(dict.fromkeys(name for container in self.containers for name in self.entries(container)))

    def entries(self, container: str) -> Any:
        """What lies under a container, by adapter: an nn.ModuleDict or an nn.ParameterDict."""
        return self.get_submodule(container)

    def entry(self, container: str, name: str) -> Any:
        """What adapter `name` has under `container`; while it is merged beside the base, the frozen copy."""
        if (container, name) in self._beside:
            return self._beside[container, name]
        return self.entries(container)[name]

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter; none if this module does not have it."""
        for container in self.containers:
            entries = self.entries(container)
            if name in entries:
                entry = entries[name]
                yield from [entry] if isinstance(entry, nn.Parameter) else entry.parameters()

    def float_weight(self) -> Tensor:
        """The base weight in its own layout in float32 or wider; decoded if the base is packed."""
        if self.writable:
            return self.weight.detach().to(torch.promote_types(self.weight.dtype, torch.float32))
        return dense_linear(self.base_layer, torch.float32).weight.detach()

    # -- files -----------------------------------------------------------------------------------------------------

    def to_file(self, name: str, tensors: dict[str, Tensor], config: PeftConfig, path: str) -> dict[str, Tensor]:
        """What a file holds of adapter `name` of this module at `path`, from its tensors by `<container>[.<key>]`."""
        return tensors

    def make_room(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Makes adapter `name` of this module fit the tensors of a file, where the method allows for other shapes."""

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
            if name in self.entries(container):
                self.entries(container).pop(name)
        self.active_adapters = [active for active in self.active_adapters if active != name]

    def check_new(self, name: str, path: str) -> None:
        """Raises if adapter `name` cannot be added now: a name that cannot be one, or is taken, or a merged base."""
        check_adapter_name(name)
        if name in self.adapter_names():
            raise TargetError(f"{path} has an adapter {name!r} already")
        if self.merged:
            raise UnsupportedError(f"{self.merged_adapters} are merged; call unmerge_adapter() before adding {name!r}")

    # -- merging ---------------------------------------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """Whether the base weight is an ordinary float tensor, into which a delta can be added."""
        packed = hasattr(self.base_layer, "dequantize")
        return not packed and self.weight.is_floating_point() and self.weight.itemsize > 1

    @torch.no_grad()
    def merge(self, names: Sequence[str]) -> None:
        """Puts adapters into W (computed in float32 or wider, rounded once). The replaced W is kept: unmerge is exact.

        A base whose weight is not a float tensor keeps its bytes, and frozen copies of the adapters stay beside it.

        Raises:
            UnsupportedError: something is merged already, or a delta on the bias has no bias to go to.
        """
        if self.merged:
            raise UnsupportedError(f"{self.merged_adapters} are merged already; call unmerge_adapter() first")
        present = [name for name in names if name in self.adapter_names()]
        if not present:
            return
        if self.writable:
            weight, bias = self._merged_tensors(present)
            self._replace("weight", weight.to(self.weight.dtype))
            if bias is not None and self.bias is not None and not torch.equal(bias, self.bias):
                self._replace("bias", bias.to(self.bias.dtype))
        else:
            self._beside = {
                (container, name): frozen(self.entries(container)[name])
                for container in self.containers
                for name in present
                if name in self.entries(container)
            }
        self.merged_adapters = present

    def unmerge(self) -> None:
        """Puts back what `merge` replaced, bit for bit."""
        for field, (parameter,) in self._unmerged.items():
            owner, name = self.place(field)
            current = getattr(owner, name)
            if parameter.device != current.device or parameter.dtype != current.dtype:
                parameter.data = parameter.data.to(current.device, current.dtype)
            setattr(owner, name, parameter)
        self._unmerged, self._beside, self.merged_adapters = {}, {}, []

    @torch.no_grad()
    def merged_module(self, names: Sequence[str], dtype: torch.dtype | None) -> nn.Module:
        """The base module with the adapters `names` in its weight, and no wrapper.

        Args:
            names: adapters to merge; those this module does not have are passed over.
            dtype: float type of the result; None keeps a float base's own, and a packed base's compute type.
        """
        present = [name for name in names if name in self.adapter_names()]
        module = self.base_layer if self.writable else dense_linear(self.base_layer, torch.float32)
        old_weight, old_bias = cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "bias", None))
        target = dtype or (old_weight.dtype if self.writable else sixteen_bit(self.base_layer))
        weight, bias = self._merged_tensors(present)
        module.weight = nn.Parameter(weight.to(target), old_weight.requires_grad)
        if bias is not None:
            module.bias = nn.Parameter(bias.to(target), old_bias is not None and old_bias.requires_grad)
        return module

    def _merged_tensors(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        weight = self.float_weight()
        bias = None if self.bias is None else self.bias.detach().to(torch.promote_types(self.bias.dtype, torch.float32))
        if not names:
            return weight.clone(), None if bias is None else bias.clone()
        return self.weight_with(names, weight), self.bias_with(names, bias)

    def place(self, field: str) -> tuple[nn.Module, str]:
        """The module that holds the base's "weight" or "bias", and the name it has there."""
        return self.base_layer, field

    def _replace(self, field: str, value: Tensor) -> None:
        owner, name = self.place(field)
        old = getattr(owner, name)
        self._unmerged[field] = (old,)
        setattr(owner, name, nn.Parameter(value, old.requires_grad))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AdapterLayer":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        for entry in self._beside.values():
            for parameter in [entry] if isinstance(entry, nn.Parameter) else entry.parameters():
                parameter.data = fn(parameter.data)
        return self


def frozen(entry: Entry) -> Entry:
    """A copy of a parameter or module that is not trained."""
    if isinstance(entry, nn.Parameter):
        return nn.Parameter(entry.detach().clone(), requires_grad=False)
    return copy.deepcopy(entry).requires_grad_(False)


def dense_linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """An `nn.Linear` with the values of a packed linear that offers `dequantize(dtype)`.

    Raises:
        UnsupportedError: the module offers no `dequantize`.
    """
    dequantize: Callable[[torch.dtype], Tensor] | None = getattr(module, "dequantize", None)
    if not isinstance(module, nn.Linear) or dequantize is None:
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
