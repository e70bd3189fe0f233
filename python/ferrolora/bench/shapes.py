"""The grammar of `--shapes`: pieces MxNxK or NxK between commas."""

from __future__ import annotations

import re
from typing import NamedTuple

_PIECE = re.compile(r"[1-9]\d*(x[1-9]\d*){1,2}")


class Shape(NamedTuple):
    """One piece: a weight [N, K], and the rows M of its activations, or None where the suite chooses them."""

    m: int | None
    n: int
    k: int


def parse_shapes(text: str) -> list[Shape]:
    """Read `512x4096x4096,11008x4096`: three sizes are MxNxK, two are the weight alone, NxK.

    Args:
        text: pieces between commas; spaces around a piece are allowed.

    Returns:
        The shapes in the order given, without repetitions.

    Raises:
        ValueError: names the piece that is neither form.
    """
    shapes = []
    for piece in (part.strip() for part in text.split(",")):
        if not _PIECE.fullmatch(piece):
            raise ValueError(
                f"{piece!r} is no shape: write MxNxK (rows of x, rows and columns of the weight) or NxK, "
                "whole numbers from 1, for instance 512x4096x4096"
            )
        *rows, n, k = map(int, piece.split("x"))
        shapes.append(Shape(rows[0] if rows else None, n, k))
    return list(dict.fromkeys(shapes))
