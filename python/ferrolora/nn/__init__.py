"""Modules over quantized weights."""

from ferrolora.nn.linear import QuantLinear as QuantLinear

__all__ = ["QuantLinear"]
