"""The error bounds hold for computations in the type, and are no wider than their formula."""

import pytest
import torch

from ferrolora.bench.approximation import UNIT_ROUNDOFF, Approximation
from ferrolora.bench.verdict import at_most_twice, within

TYPES = list(UNIT_ROUNDOFF)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_value_halfway_between_two_of_the_type_meets_the_bound(dtype: torch.dtype) -> None:
    u = UNIT_ROUNDOFF[dtype]
    halfway = torch.tensor([1.0 + u, 1.0 + 3 * u, -1.0 - u], dtype=torch.float64)
    bound = Approximation.exact(halfway).rounded(dtype)
    assert within("x", halfway.to(dtype), bound).right
    off = (halfway.to(dtype).double() - halfway).abs()
    assert torch.equal(off, torch.full_like(off, u))
    assert (bound.error <= 1.01 * u * halfway.abs()).all()


def test_a_float16_subnormal_is_within_the_bound() -> None:
    tiny = torch.tensor([2.0**-25, 3 * 2.0**-25, 2.0**-30], dtype=torch.float64)
    assert within("x", tiny.half(), Approximation.exact(tiny).rounded(torch.float16)).right


def test_two_bfloat16_hold_a_float32_within_the_bound_of_the_split() -> None:
    values = torch.randn(10_000) * 10.0 ** torch.randint(-6, 6, (10_000,))
    high = values.bfloat16().float()
    pair = high + (values - high).bfloat16().float()
    bound = Approximation.exact(values).split()
    assert within("x", pair, bound).right
    assert (bound.error <= 2.0**-17 * values.double().abs()).all()


def test_the_bound_of_a_product_grows_with_its_terms() -> None:
    ones = Approximation.exact(torch.ones(1, 1000))
    product = ones @ ones.T
    u = UNIT_ROUNDOFF[torch.float32]
    assert product.value.item() == 1000.0
    assert product.error.item() == 1000 * u / (1 - 1000 * u) * 1000


def test_errors_of_the_factors_enter_the_product() -> None:
    a = Approximation(torch.tensor([[2.0]]).double(), torch.tensor([[0.5]]).double())
    b = Approximation(torch.tensor([[3.0]]).double(), torch.tensor([[0.25]]).double())
    assert (a @ b).error.item() == pytest.approx(2.5 * 3.25 - 6.0, rel=1e-6)  # the rest is float32's own 1e-7
    assert (a @ b).error.item() >= 2.5 * 3.25 - 6.0


@pytest.mark.parametrize("dtype", TYPES)
def test_a_product_in_the_type_is_right_and_one_with_a_wrong_row_is_not(dtype: torch.dtype) -> None:
    x, w = torch.randn(7, 96).to(dtype), torch.randn(5, 96).to(dtype)
    expected = (Approximation.exact(x) @ Approximation.exact(w).T).rounded(dtype)
    y = (x.float() @ w.float().T).to(dtype)
    assert within("y", y, expected).right
    y[3, 2] *= 1.5
    verdict = within("y", y, expected)
    assert not verdict.right
    assert verdict.note.startswith("y: 1 of 35 values outside the bound")


def test_nan_and_another_shape_are_wrong() -> None:
    expected = Approximation.exact(torch.ones(2, 2)).rounded(torch.float32)
    assert not within("y", torch.tensor([[1.0, 1.0], [torch.nan, 1.0]]), expected).right
    assert "shape [4] in place of [2, 2]" in within("y", torch.ones(4), expected).note


def test_twice_the_error_of_the_plain_computation_is_the_limit() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    plain = (exact + 0.01).bfloat16()  # 1.0078125
    error = float(plain[0]) - 1.0
    assert at_most_twice("y", 1.0 + 2 * error * torch.ones(4), plain, exact).right
    assert not at_most_twice("y", 1.0 + 2.1 * error * torch.ones(4), plain, exact).right
