"""`dequantize`: a QuantTensor back to floats."""

import torch
from torch import Tensor

from ferrolora.errors import ShapeError
from ferrolora.ops.checks import require_device
from ferrolora.tensor import QuantTensor


def dequantize(qt: QuantTensor, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
    """Decode: nf4, fp4 `table[code] * absmax(block)`, int8 `code * absmax(row) / 127`, in float32, rounded once.

    Args:
        qt: the quantized tensor.
        dtype: float32, float16 or bfloat16. Default None: the dtype of `out`, else `qt.dtype`.
        out: a float tensor of shape `qt.shape` to fill instead of a new one, any strides. Default None.

    Returns:
        `out`, or a new tensor of shape `qt.shape`.

    Raises:
        ShapeError: out has another shape or its type contradicts dtype.
        UnsupportedError: another dtype, or a device without a kernel.
    """
    require_device("dequantize", qt.codes, qt.codec, absmax=qt.absmax, nested_absmax=qt.nested_absmax, out=out)
    if out is None:
        return qt.dequantize(dtype)
    if out.shape != qt.shape or (dtype is not None and dtype != out.dtype):
        wanted = "any float type" if dtype is None else dtype
        raise ShapeError(f"dequantize: out must be {list(qt.shape)} {wanted}, not {list(out.shape)} {out.dtype}")
    if qt.spec.is_4bit:
        torch.ops.ferrolora.dequantize_4bit_out(qt.codes, qt.absmax, qt.nested_absmax, qt.offset, *qt.codec, out)
    else:
        torch.ops.ferrolora.dequantize_int8_out(qt.codes, qt.absmax, out)
    return out
