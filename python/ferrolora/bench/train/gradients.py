"""Whether the gradients of a quantized model are right: against a float model that holds its decoded weights."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ferrolora.bench.approximation import UNIT_ROUNDOFF
from ferrolora.bench.contender import PEFT
from ferrolora.bench.inputs import SPEC
from ferrolora.bench.train.adapt import FLOAT, build
from ferrolora.bench.train.models import Model, batch_of
from ferrolora.nn import QuantLinear
from ferrolora.tensor import QuantTensor


class GradientError(NamedTuple):
    """Relative error of all gradients together (norm of the difference over the norm), and what it may be."""

    error: float
    bound: float


def check(library: str, model: Model, dtype: torch.dtype) -> GradientError:
    """Compare the gradients of a library's model with those of the float32 model with the same adapters.

    In float32 the bound is K·2⁻²⁴, K the longest sum of the step: a sum of K products is off by at most that share of
    the sum of their magnitudes. In a 16-bit type it is twice the error of the dense model in that type, which holds the
    decoded weights rounded to it: what the type itself costs, in the same code of transformers.
    """
    network = build(library, model, dtype)
    exact = dense_twin(library, model, network, torch.float32)
    bound = longest_sum(exact, model) * UNIT_ROUNDOFF[torch.float32]
    expected = gradients(exact, batch_of(model))
    if dtype != torch.float32:
        plain = gradients(dense_twin(library, model, network, dtype), batch_of(model))
        bound = 2.0 * relative_error(plain, expected)
    return GradientError(relative_error(gradients(network, batch_of(model)), expected), bound)


def gradients(network: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of each trainable parameter after one forward and backward."""
    network.zero_grad()
    network(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all gradients together.

    Raises:
        KeyError: the parameters differ.
    """
    if found.keys() != expected.keys():
        raise KeyError(f"gradients of different parameters: {sorted(expected.keys() ^ found.keys())[:4]}")
    wrong = sum(float((found[name].double() - gradient.double()).square().sum()) for name, gradient in expected.items())
    whole = sum(float(gradient.double().square().sum()) for gradient in expected.values())
    return float((wrong / whole) ** 0.5)


def longest_sum(network: nn.Module, model: Model) -> int:
    """The most products that any matrix product of the step sums: a side of a linear layer, or the tokens."""
    sides = [max(module.weight.shape) for module in network.modules() if isinstance(module, nn.Linear)]
    return max(*sides, model.batch[0] * model.batch[1])


def dense_twin(library: str, model: Model, network: nn.Module, dtype: torch.dtype) -> Any:
    """LoRA over float layers in `dtype` that hold the values the 4-bit base of `network` stands for."""
    twin = build(FLOAT, model, dtype)
    decoded = dict(_decoded_weights(library, network))
    same = dict(network.named_parameters())
    for name, parameter in twin.named_parameters():
        if name in decoded:
            parameter.data.copy_(decoded.pop(name))
        elif name in same:  # embeddings, norms, adapters: as the network holds them, rounded to its type
            parameter.data.copy_(same[name])
    if decoded:
        raise KeyError(f"the float model has no parameter for {sorted(decoded)}")
    return twin


def _decoded_weights(library: str, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(parameter name in the float model, decoded float32 weight) of each quantized layer."""
    for name, module in network.named_modules():
        if isinstance(module, QuantLinear):
            yield f"{name}.weight", module.dequantize(torch.float32)
        elif isinstance(module, _four_bit_layer(library)):
            # Not by bitsandbytes: its own decoder is wrong for some shapes, which is what the check is to find.
            weight: Any = module.weight
            state = weight.quant_state
            scales = (state.absmax, state.state2.absmax, state.offset)
            yield f"{name}.weight", QuantTensor(weight.data, *scales, SPEC, state.shape, torch.float32).dequantize()


def _four_bit_layer(library: str) -> Any:
    """bitsandbytes' layer class, without importing it for another library."""
    if library != PEFT:
        return ()
    bnb: Any = import_module("bitsandbytes")
    return bnb.nn.Linear4bit
