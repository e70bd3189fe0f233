"""THE table of LoRA initializers: the value of `init_lora_weights` -> the function that fills A and B."""

from collections.abc import Callable

from torch import Tensor

from ferrolora.adapters.init.gaussian import gaussian
from ferrolora.adapters.init.kaiming import kaiming
from ferrolora.errors import UnsupportedError

Initializer = Callable[[Tensor, Tensor], None]  # (A [r, in], B [out, r]), filled in place


def _keep(a: Tensor, b: Tensor) -> None:
    """`init_lora_weights=False`: A and B stay as `nn.Linear` drew them, so that the adapter changes the output."""


INITIALIZERS: dict[bool | str, Initializer] = {True: kaiming, False: _keep, "gaussian": gaussian}


def initializer(name: bool | str) -> Initializer:
    """The function of an initializer. Raises UnsupportedError that names the field and lists the valid values."""
    if name not in INITIALIZERS:
        valid = ", ".join(repr(key) for key in INITIALIZERS)
        raise UnsupportedError(f"init_lora_weights={name!r} is not supported; choose one of {valid}")
    return INITIALIZERS[name]
