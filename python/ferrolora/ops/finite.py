"""What CUDA kernels find out on the device, NaN and infinity in a weight, as the error that the CPU's raise."""

import torch
from torch import Tensor

from ferrolora.errors import CudaError, QuantizationError


def finite_flag(x: Tensor) -> Tensor:
    """The word that a quantizing kernel sets if x holds NaN or infinity.

    Raises:
        CudaError: a CUDA graph is being captured: whether to refuse x is known on the host only after the kernel.
    """
    if torch.cuda.is_current_stream_capturing():
        raise CudaError("quantizing waits for the device, which a CUDA graph cannot; quantize before the capture")
    return torch.zeros(1, dtype=torch.int32, device=x.device)


def require_finite(flag: Tensor, x: Tensor, name: str | None) -> None:
    """Raise QuantizationError if the flag is set; it says how many values are not finite and where the first is."""
    if not bool(flag):
        return
    bad = torch.isfinite(x.reshape(-1)).logical_not_()
    count, first = int(bad.sum()), int(bad.int().argmax())
    raise QuantizationError(
        f"{name or 'the tensor'} holds {count} NaN or infinite value(s), the first at flat index {first}; "
        "clean the weight before quantizing it"
    )
