"""The grammar of --shapes."""

import pytest

from ferrolora.bench.plan import plan
from ferrolora.bench.shapes import Shape, parse_shapes


def test_three_sizes_are_a_product_and_two_a_weight() -> None:
    assert parse_shapes("512x4096x11008, 64x32") == [Shape(512, 4096, 11008), Shape(None, 64, 32)]


def test_a_repeated_shape_counts_once() -> None:
    assert parse_shapes("8x8,8x8") == [Shape(None, 8, 8)]


@pytest.mark.parametrize("piece", ["", "8", "8x", "x8", "8x8x8x8", "0x8", "8x-1", "8×8", "8.0x8", "axb"])
def test_the_piece_that_is_no_shape_is_named(piece: str) -> None:
    with pytest.raises(ValueError, match="is no shape: write MxNxK") as raised:
        parse_shapes(f"16x16,{piece},32x32")
    assert str(raised.value).startswith(repr(piece))


def test_a_suite_on_the_weight_alone_drops_the_rows_and_a_product_adds_its_own() -> None:
    shapes = [Shape(4, 64, 32), Shape(9, 64, 32), Shape(None, 64, 32)]
    assert [work.problem.work for work in plan(["quantize"], shapes, ["float32"])] == ["64x32"]
    works = [work.problem.work for work in plan(["linear"], shapes, ["float32"])]
    assert works == ["4x64x32", "9x64x32", "1x64x32", "8x64x32", "16x64x32", "128x64x32", "512x64x32"]
