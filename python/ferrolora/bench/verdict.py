"""Whether a result is right, decided before it is timed."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ferrolora.bench.approximation import Approximation


class Verdict(NamedTuple):
    """The outcome of a check.

    Args:
        right: whether the time may be shown.
        note: why not, or in what the result departs from what was asked. Default "": nothing to say.
        error: relative error of the whole result, the norm of the difference over the norm; None where the check is
            one of equality. Default None.
    """

    right: bool
    note: str = ""
    error: float | None = None


def same(what: str, found: Tensor, expected: Tensor) -> Verdict:
    """Right if type, shape and every value are equal."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return Verdict(False, f"{what}: {_form(found)} in place of {_form(expected)}")
    wrong = int((found != expected).sum())
    if wrong:
        return Verdict(False, f"{what}: {wrong} of {found.numel()} values differ")
    return Verdict(True)


def within(what: str, found: Tensor, expected: Approximation) -> Verdict:
    """Right if every value lies within its bound; NaN never does."""
    if found.shape != expected.value.shape:
        return Verdict(False, f"{what}: shape {list(found.shape)} in place of {list(expected.value.shape)}")
    difference = (found.detach().double() - expected.value).abs()
    error = float(difference.norm() / expected.value.norm())
    outside = int((~(difference <= expected.error)).sum())
    if outside:
        return Verdict(
            False, f"{what}: {outside} of {found.numel()} values outside the bound, off by {error:.2g}", error
        )
    return Verdict(True, error=error)


def at_most_twice(what: str, found: Tensor, plain: Tensor, exact: Tensor) -> Verdict:
    """Right if the error, in norm, is at most twice that of a plain computation in the same 16-bit type.

    The bound of `within` takes all roundings to fall the same way; where the weight is rounded to 16 bits it is wide.
    In sum they nearly cancel, in every correct computation alike, and twice leaves room for other places of rounding.
    """
    error = float((found.detach().double() - exact).norm())
    allowed = 2.0 * float((plain.double() - exact).norm())
    relative = error / float(exact.norm())
    if error <= allowed:
        return Verdict(True, error=relative)
    return Verdict(False, f"{what}: off by {relative:.2g}, over twice the error of plain {found.dtype}", relative)


def first_wrong(*verdicts: Verdict) -> Verdict:
    """The first verdict that is not right; else right, with the largest error."""
    for verdict in verdicts:
        if not verdict.right:
            return verdict
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    return Verdict(True, error=max(errors, default=None))


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
