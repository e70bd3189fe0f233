"""The start of LoRA as the paper words it."""

from torch import Tensor, nn


def gaussian(a: Tensor, b: Tensor) -> None:
    """A ~ N(0, (1/r)^2); B = 0.

    Args:
        a: [r, in], filled in place.
        b: [out, r], filled in place.

    Source: LoRA, arXiv 2106.09685, section 4.1, with PEFT's standard deviation.
    """
    nn.init.normal_(a, std=1 / a.shape[0])
    nn.init.zeros_(b)
