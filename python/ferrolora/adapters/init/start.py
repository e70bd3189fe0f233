"""What an initializer is given, and what it may give back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Start:
    """A new adapter on one module.

    Attributes:
        a: [r, in], filled in place; float32 or wider.
        b: [out, r], filled in place; float32 or wider.
        scaling: s of y = Wx + s·BAx.
        name: the value of `init_lora_weights`.
        weight: gives the float base weight [out, in] before any quantization.
        quantized: gives the values that the base would hold if it were given a float weight [out, in].
        packed: whether the base quantizes whatever weight it is given.
        options: the initializer's own settings, from the configuration.
    """

    a: Tensor
    b: Tensor
    scaling: float
    name: bool | str
    weight: Callable[[], Tensor]
    quantized: Callable[[Tensor], Tensor]
    packed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


# Fills A and B; gives back the float weight that the base should hold from now on, or None to leave it.
Initializer = Callable[[Start], Tensor | None]
