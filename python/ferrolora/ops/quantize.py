"""`quantize`: a float tensor to a QuantTensor."""

import torch
from torch import Tensor

from ferrolora.errors import ShapeError
from ferrolora.ops.checks import require_device, require_float
from ferrolora.spec import QuantSpec
from ferrolora.tensor import QuantTensor

_DEFAULT = QuantSpec()


def quantize(w: Tensor, spec: QuantSpec = _DEFAULT, name: str | None = None) -> QuantTensor:
    """Quantize a tensor: nf4, fp4 `code = nearest(w / absmax(block))`, int8 `code = round(127 * w / absmax(row))`.

    Args:
        w: float32, float16 or bfloat16, any shape and strides, at least one value. Blocks run over the flattened
            tensor; the rows of int8 are its last dimension.
        spec: the codec. Default nf4, blocks of 64, double quantization.
        name: what an error calls the tensor. Default None.

    Returns:
        A QuantTensor on the device of w, detached from autograd.

    Raises:
        QuantizationError: w holds NaN or infinity; says how many and where the first is.
        ShapeError: w is empty.
        UnsupportedError: another dtype, or a device without a kernel.

    Source: QLoRA, arXiv 2305.14314; the bytes are those of bitsandbytes 0.50.
    """
    require_device("quantize", w, (spec.quant_type, spec.block_size))
    require_float("quantize", name or "w", w.dtype)
    if w.numel() == 0:
        raise ShapeError(f"quantize: {name or 'w'} of shape {list(w.shape)} holds no values")
    nested: Tensor | None = None
    offset: Tensor | None = None
    if spec.is_4bit:
        codes, absmax = torch.ops.ferrolora.quantize_4bit(w.detach(), spec.quant_type, spec.block_size, name)
    else:
        rows = w.detach().reshape(-1, w.shape[-1] if w.dim() else 1)
        codes, absmax = torch.ops.ferrolora.quantize_int8(rows, name)
    if spec.double_quant:
        absmax, nested, offset = torch.ops.ferrolora.double_quantize(absmax)
    return QuantTensor(codes, absmax, nested, offset, spec, w.shape, w.dtype)
