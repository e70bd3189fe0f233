"""The table of suites."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ferrolora.bench.contender import Case
from ferrolora.bench.problem import Problem
from ferrolora.bench.suites import backward, dequantize, linear, lora, quantize


class Suite(NamedTuple):
    """How to make a case, and the rows of activations that stand where the command line names none."""

    case: Callable[[Problem, frozenset[str]], Case]
    rows: tuple[int, ...]  # empty: an operation on the weight alone


SUITES: dict[str, Suite] = {
    "quantize": Suite(quantize.case, ()),
    "dequantize": Suite(dequantize.case, ()),
    "linear": Suite(linear.case, (1, 8, 16, 128, 512)),
    "backward": Suite(backward.case, (512,)),
    "lora": Suite(lora.case, (512,)),
}
