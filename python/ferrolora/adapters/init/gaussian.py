"""The start of LoRA as the paper words it."""

from torch import nn

from ferrolora.adapters.init.start import Start


def gaussian(start: Start) -> None:
    """A ~ N(0, (1/r)^2); B = 0.

    Source: LoRA, arXiv 2106.09685, section 4.1, with PEFT's standard deviation.
    """
    nn.init.normal_(start.a, std=1 / start.a.shape[0])
    nn.init.zeros_(start.b)
