"""A module that is trained and saved in full, one copy an adapter, instead of getting a low-rank matrix."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ferrolora.adapters.base import check_adapter_name
from ferrolora.adapters.rows import RowGroups, forward_groups
from ferrolora.errors import TargetError, UnsupportedError


class ModulesToSaveWrapper(nn.Module):
    """y = copy_a(x) for the active adapter a, else original(x).

    In memory the copies are `modules_to_save.<adapter>`; in files they carry the module's own names.
    """

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        packed = [name for name, p in module.named_parameters() if not p.is_floating_point()]
        if packed:
            raise UnsupportedError(
                f"{path} is in modules_to_save, but {packed[0]!r} in it is quantized and cannot be trained; "
                "load the model with this module in skip_modules"
            )
        self.original_module = module.requires_grad_(False)
        self.modules_to_save = nn.ModuleDict()
        self.active_adapters: list[str] = []
        self.adapters_enabled = True
        self.row_groups: RowGroups | None = None  # set while a batch mixes adapters

    def adapter_names(self) -> list[str]:
        """The adapters that have a copy here."""
        return list(self.modules_to_save)

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter's copy; none if it has none."""
        if name in self.modules_to_save:
            yield from self.modules_to_save[name].parameters()

    def add_adapter(self, name: str) -> None:
        """Gives adapter `name` its own copy of the original module."""
        check_adapter_name(name)
        if name in self.modules_to_save:
            raise TargetError(f"adapter {name!r} has its copy of this module already")
        self.modules_to_save[name] = copy.deepcopy(self.original_module)

    def activate(self, names: Sequence[str], trainable: bool) -> None:
        """Makes the one of `names` that has a copy here the active one.

        Raises:
            UnsupportedError: several of them have one; nothing says which should count.
        """
        present = [name for name in names if name in self.modules_to_save]
        if len(present) > 1:
            raise UnsupportedError(f"adapters {present} each bring a full copy of one module; only one can be active")
        self.active_adapters = present
        for name in self.modules_to_save:
            self.modules_to_save[name].requires_grad_(trainable and name in present)

    def delete_adapter(self, name: str) -> None:
        """Removes the copy of adapter `name`, if there is one."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]
        self.active_adapters = [active for active in self.active_adapters if active != name]

    @property
    def active_module(self) -> nn.Module:
        """The copy in use, or the original."""
        if self.adapters_enabled and self.active_adapters:
            return self.modules_to_save[self.active_adapters[0]]
        return self.original_module

    def __getattr__(self, name: str) -> Any:
        """`weight`, `out_features`, … of the module in use: models read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):  # not there yet while unpickling
                raise
            return getattr(self.active_module, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module in use returns; in a mixed batch, a tensor with each row through its own copy."""
        if self.row_groups is None or not self.adapters_enabled:
            return self.active_module(*args, **kwargs)
        if len(args) != 1 or kwargs:
            raise UnsupportedError("adapter_names: a fully trained module must take one tensor to mix adapters")
        return forward_groups(self, args[0], self.row_groups)

    def forward_as(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """What the copy of the one adapter in `names`, or the original, returns."""
        present = [name for name in names if name in self.modules_to_save]
        module = self.modules_to_save[present[0]] if present else self.original_module
        y: Tensor = module(x)
        return y
