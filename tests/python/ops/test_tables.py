"""The tables, recomputed from their derivations."""

import pytest
import torch

from ferrolora import _native
from ferrolora.errors import FerroloraError
from ferrolora.ops import reference


@pytest.mark.parametrize("name", ["nf4", "fp4", "dynamic8"])
def test_native_and_twin_hold_the_same_bits(name: str) -> None:
    native = torch.tensor(_native.codebook(name), dtype=torch.float32)
    assert torch.equal(native.view(torch.int32), reference.codebook(name).view(torch.int32))


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(FerroloraError, match=r"nf4, fp4, dynamic8.*nf3"):
        _native.codebook("nf3")


def test_nf4_is_the_normalised_quantiles_of_the_normal_distribution() -> None:
    offset = 1 - 0.5 * (1 / 32 + 1 / 30)
    quantile = torch.special.ndtri
    positive = quantile(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -quantile(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([positive, torch.zeros(1, dtype=torch.float64), negative]).sort().values
    # The published offset 0.9677083 has seven digits: 3.3e-8 off, times the quantile's slope 1/pdf(1.85) = 14 over
    # the largest quantile 1.85, is 2.5e-7.
    assert (values / values.max() - reference.codebook("nf4")).abs().max() < 2.5e-7


def test_fp4_is_sign_two_exponent_bits_and_one_mantissa_bit_in_twelfths() -> None:
    magnitudes = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3], dtype=torch.float64) / 12
    assert torch.equal(reference.codebook("fp4"), torch.cat([magnitudes, -magnitudes]).float())


def test_the_dynamic_map_is_sorted_and_has_no_minus_one() -> None:
    table = reference.codebook("dynamic8")
    assert table.shape == (256,)
    assert bool((table.diff() > 0).all())
    assert (float(table[0]), float(table[127]), float(table[-1])) == (-0.992968738079071, 0.0, 1.0)
