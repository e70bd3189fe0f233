"""Which problems a run measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ferrolora.bench.problem import Problem
from ferrolora.bench.shapes import Shape
from ferrolora.bench.suites.registry import SUITES

DEFAULT_SHAPES = (Shape(None, 4096, 4096),)


class Work(NamedTuple):
    """One problem of one suite."""

    suite: str
    problem: Problem


def plan(suites: Sequence[str], shapes: Sequence[Shape], dtypes: Sequence[str]) -> list[Work]:
    """Every suite over every shape and type.

    Args:
        suites: keys of `SUITES`.
        shapes: a suite on the weight alone takes N and K of each; the others take M too, or their own rows where a
            shape has none.
        dtypes: keys of `DTYPES`.

    Returns:
        The work in the order of suites, types, shapes, without repetitions.
    """
    found = []
    for suite in suites:
        for dtype in dtypes:
            for shape in shapes:
                if not SUITES[suite].rows:
                    rows: tuple[int | None, ...] = (None,)
                else:
                    rows = (shape.m,) if shape.m is not None else SUITES[suite].rows
                found += [Work(suite, Problem(shape.n, shape.k, dtype, m)) for m in rows]
    return list(dict.fromkeys(found))
