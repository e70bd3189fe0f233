"""THE table of LoRA initializers: the value of `init_lora_weights` -> the function that fills A and B."""

import re

from ferrolora.adapters.init.eva import eva
from ferrolora.adapters.init.gaussian import gaussian
from ferrolora.adapters.init.kaiming import kaiming
from ferrolora.adapters.init.loftq import loftq
from ferrolora.adapters.init.olora import olora
from ferrolora.adapters.init.pissa import pissa
from ferrolora.adapters.init.start import Initializer, Start
from ferrolora.errors import UnsupportedError


def _keep(start: Start) -> None:
    """`init_lora_weights=False`: A and B stay as `nn.Linear` drew them, so that the adapter changes the output."""


INITIALIZERS: dict[bool | str, Initializer] = {
    True: kaiming,
    False: _keep,
    "gaussian": gaussian,
    "pissa": pissa,
    "olora": olora,
    "loftq": loftq,
    "eva": eva,
}


def initializer(name: bool | str) -> Initializer:
    """The function of an initializer ("pissa_niter_16" is PiSSA's).

    Raises:
        UnsupportedError: names the field and lists the valid values.
    """
    key = "pissa" if isinstance(name, str) and re.fullmatch(r"pissa_niter_\d+", name) else name
    if key not in INITIALIZERS:
        valid = ", ".join(repr(key) for key in INITIALIZERS)
        raise UnsupportedError(
            f"init_lora_weights={name!r} is not supported; choose one of {valid}, or 'pissa_niter_<number>'"
        )
    return INITIALIZERS[key]
