"""Layers to and from bitsandbytes' own form.

The bytes are the same, so nothing is decoded or quantized again; bitsandbytes itself need not be installed.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ferrolora.errors import FormatError, UnsupportedError
from ferrolora.nn import QuantLinear
from ferrolora.nn.quant_state import from_state, to_state


def layer_from_state(state: Mapping[str, Tensor], prefix: str = "", dtype: torch.dtype | None = None) -> QuantLinear:
    """The layer that a state dict of `bitsandbytes.nn.Linear4bit` or `Linear8bitLt` describes.

    Args:
        state: a state dict; other layers may be in it.
        prefix: of the layer, with its trailing dot. Default "".
        dtype: the float type of an 8-bit weight, which its state does not record. Default None: float32.

    Returns:
        A QuantLinear that shares the tensors of state; codec, shape and type are those the state records.

    Raises:
        FormatError: there is no quantized weight at prefix, or one of its entries disagrees; names the key.
    """
    qt = from_state(state, prefix, dtype=dtype)
    bias = state.get(f"{prefix}bias")
    if bias is not None and tuple(bias.shape) != (qt.shape[0],):
        raise FormatError(f"{prefix}bias must be [{qt.shape[0]}], not {list(bias.shape)}")
    return QuantLinear.from_quant_tensor(qt, None if bias is None else nn.Parameter(bias))


def layer_from_module(module: nn.Module, dtype: torch.dtype | None = None) -> QuantLinear:
    """The same layer as a quantized `bitsandbytes.nn.Linear4bit` or `Linear8bitLt`, sharing its tensors.

    Args:
        module: the layer; quantized, that is, moved to its device once.
        dtype: as in `layer_from_state`.

    Raises:
        FormatError: the layer is not quantized yet.
    """
    layer = layer_from_state(module.state_dict(), dtype=dtype)
    original = getattr(module, "bias", None)
    if layer._parameters["bias"] is not None and original is not None:
        layer.bias.requires_grad_(original.requires_grad)
    return layer.train(module.training)


def prequantized(layer: QuantLinear) -> tuple[Tensor, dict[str, Tensor]]:
    """What `bitsandbytes.nn.Params4bit.from_prequantized(data, quantized_stats)` takes to hold this layer's weight.

    Args:
        layer: an nf4 or fp4 layer.

    Returns:
        The packed weight and the other entries of its state, without the prefix `weight.`.

    Raises:
        UnsupportedError: the layer is int8; bitsandbytes reads that from the state dict itself.
    """
    if not layer.spec.is_4bit:
        raise UnsupportedError(f"from_prequantized takes nf4 and fp4 weights, not {layer.spec.quant_type}")
    state = to_state(layer.quant_tensor())
    weight = state.pop("weight")
    return weight, {key.removeprefix("weight."): tensor for key, tensor in state.items()}
