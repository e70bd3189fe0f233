"""The default start of LoRA."""

import math

from torch import Tensor, nn


def kaiming(a: Tensor, b: Tensor) -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), which is Kaiming-uniform with a = sqrt(5); B = 0.

    Args:
        a: [r, in], filled in place.
        b: [out, r], filled in place.

    Source: LoRA, arXiv 2106.09685, and its reference code.
    """
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b)
