"""A convolution with another weight, for adapters whose delta has the shape of the weight."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ferrolora.errors import UnsupportedError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def convolve(base: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """`base` without its bias and with `weight` for its own; x is converted to the type of `weight`.

    Raises:
        UnsupportedError: the base pads with something else than zeros.
    """
    conv: Any = base
    if conv.padding_mode != "zeros":
        raise UnsupportedError(f"a convolution with padding_mode={conv.padding_mode!r} cannot take a delta weight")
    convolution = _FUNCTIONS[weight.dim()]
    y: Tensor = convolution(x.to(weight.dtype), weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y
