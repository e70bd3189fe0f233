"""Modules over quantized weights."""

from ferrolora.nn.experts import QuantExperts as QuantExperts
from ferrolora.nn.linear import QuantLinear as QuantLinear
from ferrolora.nn.linear import read_as_float as read_as_float

__all__ = ["QuantExperts", "QuantLinear", "read_as_float"]
