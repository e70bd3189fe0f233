import dataclasses

import pytest

from ferrolora import QuantSpec, UnsupportedError
from ferrolora.spec import BLOCK_SIZES


def test_the_default_is_nf4_in_blocks_of_64_with_double_quantization() -> None:
    assert QuantSpec() == QuantSpec("nf4", block_size=64, double_quant=True)


def test_an_unknown_quant_type_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(UnsupportedError, match="'nf3' is unknown; choose one of nf4, fp4, int8"):
        QuantSpec("nf3")


@pytest.mark.parametrize("block_size", [0, 16, 63, 8192, True, 64.5, "64"])
def test_an_unknown_block_size_is_refused_with_the_valid_ones(block_size: object) -> None:
    with pytest.raises(UnsupportedError, match="choose one of 32, 64, 128"):
        QuantSpec(block_size=block_size)  # type: ignore[arg-type]  # the wrong type is the point


def test_double_quant_that_is_not_a_bool_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="double_quant must be True or False, not 'yes'"):
        QuantSpec(double_quant="yes")  # type: ignore[arg-type]  # the wrong type is the point


def test_int8_specs_that_differ_in_what_int8_ignores_are_equal() -> None:
    assert QuantSpec("int8", 128, True) == QuantSpec("int8") == QuantSpec("int8", double_quant=False)
    assert not QuantSpec("int8").double_quant
    assert not QuantSpec("int8").is_4bit


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().block_size = 128  # type: ignore[misc]  # the assignment is the point


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_last_short_block_counts(block_size: int) -> None:
    spec = QuantSpec(block_size=block_size)
    assert [spec.block_count(n) for n in (1, block_size, block_size + 1)] == [1, 1, 2]
