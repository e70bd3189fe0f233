"""THE table of adapter methods: peft_type -> configuration class and the function that wraps a module."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor, nn

from ferrolora.adapters import adalora, ia3, loha, lora
from ferrolora.adapters.base import AdapterLayer
from ferrolora.adapters.config import PeftConfig, PeftType
from ferrolora.errors import UnsupportedError


class AdapterMethod(NamedTuple):
    """One row: a method's configuration, how it wraps a module (path given for messages), what it adds to the loss."""

    config_class: type[PeftConfig]
    wrap: Callable[[nn.Module, str, PeftConfig], AdapterLayer] | None
    penalty: Callable[[Iterable[AdapterLayer], str, PeftConfig], Tensor | None] | None = None


METHODS: dict[PeftType, AdapterMethod] = {
    PeftType.LORA: AdapterMethod(lora.LoraConfig, lora.wrap),
    PeftType.ADALORA: AdapterMethod(adalora.AdaLoraConfig, adalora.wrap, adalora.orthogonal_penalty),
    PeftType.IA3: AdapterMethod(ia3.IA3Config, ia3.wrap),
    PeftType.LOHA: AdapterMethod(loha.LoHaConfig, loha.wrap),
}


def method_of(peft_type: PeftType | str | None) -> AdapterMethod:
    """The row of a method. Raises UnsupportedError with the valid names for any other."""
    valid = {method.value: method for method in METHODS}
    if peft_type not in valid:
        raise UnsupportedError(f"peft_type {peft_type!r} is not supported; choose one of {', '.join(valid)}")
    return METHODS[PeftType(peft_type)]
