"""A packed weight as operators pass it around and as the native kernels take it."""

from torch import Tensor

# offset is a tensor, not a number: it differs from layer to layer, and torch.compile would compile each anew.
SCHEMA = "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? offset, str quant_type, int block_size"
MATRIX_SCHEMA = f"{SCHEMA}, int n, int k"


def native_weight(
    codes: Tensor, absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Contiguous tensors (no copy when they are already, as they nearly always are) and the offset as a number."""
    nested = None if nested_absmax is None else nested_absmax.contiguous()
    return codes.contiguous(), absmax.contiguous(), nested, 0.0 if offset is None else float(offset)
