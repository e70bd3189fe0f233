"""The default start of LoRA."""

import math

from torch import nn

from ferrolora.adapters.init.start import Start


def kaiming(start: Start) -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), which is Kaiming-uniform with a = sqrt(5); B = 0.

    Source: LoRA, arXiv 2106.09685, and its reference code.
    """
    nn.init.kaiming_uniform_(start.a, a=math.sqrt(5))
    nn.init.zeros_(start.b)
