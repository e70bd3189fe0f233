"""A packed weight to floats on a GPU, for `dequantize` and for the products that go through a decoded weight."""

from torch import Tensor

from ferrolora.cuda.launch import prepare, ready, run


def decode(
    out: Tensor,
    rows: int,
    columns: int,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
) -> None:
    """Write `table[code] * absmax(block)` or `code * absmax(row) / 127`, rounded once to the type of out.

    Args:
        out: float32, float16 or bfloat16, `rows * columns` values, as `ready` makes a tensor.
        rows: rows that int8 has a scale for each of; 4-bit blocks run over the flattened values, in any rows.
        columns: values of a row.
        codes: of the packed weight, as are the five that follow.
        absmax: float32 or uint8 scales.
        nested_absmax: float32 scales of the scales, or None.
        offset: float32 mean of the scales, or None.
        quant_type: "nf4", "fp4" or "int8".
        block_size: values that share a scale; int8 does not use it.
    """
    if out.numel() == 0:
        return
    index, nested = out.get_device(), nested_absmax is not None
    launch = prepare(
        index, "dequantize", out.dtype, rows, columns, quant_type=quant_type, block_size=block_size, nested=nested
    )
    assert launch is not None  # no library function stands for it
    run(launch, index, {**stored(codes, absmax, nested_absmax, offset), "scb": ready(absmax), "out": out})


def stored(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None
) -> dict[str, Tensor | float | None]:
    """The parts of a packed weight by the names of the kernels' parameters."""
    nested = None if nested_absmax is None else ready(nested_absmax)
    return {"codes": ready(codes), "absmax": ready(absmax), "nested": nested, "offset": offset}
