"""Modules over quantized weights."""

from ferrolora.nn.experts import QuantExperts as QuantExperts
from ferrolora.nn.linear import QuantLinear as QuantLinear

__all__ = ["QuantExperts", "QuantLinear"]
