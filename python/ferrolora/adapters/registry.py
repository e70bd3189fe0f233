"""THE table of adapter methods: peft_type -> configuration class and the function that wraps a module."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from ferrolora.adapters import lora
from ferrolora.adapters.base import AdapterLayer
from ferrolora.adapters.config import PeftConfig, PeftType
from ferrolora.errors import UnsupportedError


class AdapterMethod(NamedTuple):
    """One row: how a method is configured, and how it wraps a module (path given for messages)."""

    config_class: type[PeftConfig]
    wrap: Callable[[nn.Module, str], AdapterLayer]


METHODS: dict[PeftType, AdapterMethod] = {
    PeftType.LORA: AdapterMethod(lora.LoraConfig, lora.wrap),
}


def method_of(peft_type: PeftType | str | None) -> AdapterMethod:
    """The row of a method. Raises UnsupportedError with the valid names for any other."""
    valid = {method.value: method for method in METHODS}
    if peft_type not in valid:
        raise UnsupportedError(f"peft_type {peft_type!r} is not supported; choose one of {', '.join(valid)}")
    return METHODS[PeftType(peft_type)]
