"""The libraries that ferrolora is measured against, and which of them are installed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec

from ferrolora.bench.contender import BITSANDBYTES, PEFT, TORCH
from ferrolora.errors import UnsupportedError

# Name on the command line -> (what its rows are called, the packages it takes).
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": (TORCH, ("torch",)),
    "bitsandbytes": (BITSANDBYTES, ("bitsandbytes",)),
    "peft": (PEFT, ("peft", "bitsandbytes")),
}


def installed_peers() -> list[str]:
    """The peers whose packages are all installed."""
    return [name for name in PEERS if not missing_packages(name)]


def missing_packages(name: str) -> list[str]:
    """The packages that the peer takes and this environment lacks."""
    return [package for package in PEERS[name][1] if find_spec(package) is None]


def choose_peers(names: Sequence[str] | None) -> frozenset[str]:
    """What the rows of the chosen peers are called.

    Args:
        names: keys of `PEERS`; None for those that are installed.

    Raises:
        UnsupportedError: a named peer is not installed; says how to install it.
    """
    for name in names or ():
        missing = missing_packages(name)
        if missing:
            raise UnsupportedError(f"{name} is not installed: pip install {' '.join(missing)}")
    chosen = installed_peers() if names is None else names
    if {"bitsandbytes", "peft"}.intersection(chosen):
        # It says on import, for every process, that an optional package was not found.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return frozenset(PEERS[name][0] for name in chosen)
