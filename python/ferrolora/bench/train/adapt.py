"""A model quantized and given the same LoRA by each library."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ferrolora.adapters.lora import LoraConfig
from ferrolora.adapters.siblings import share_inputs
from ferrolora.bench.contender import OURS, PEFT
from ferrolora.bench.inputs import SPEC
from ferrolora.bench.train.models import Model
from ferrolora.model.quantize import quantize_model
from ferrolora.model.tasks import get_peft_model

RANK, ALPHA = 16, 32
FLOAT = "float"  # LoRA over the float model: nothing is quantized


def build(library: str, model: Model, dtype: torch.dtype) -> Any:
    """The model with a base in NF4 and a LoRA on every linear layer but the head, in training mode.

    Args:
        library: `OURS`, `PEFT`, or `FLOAT`.
        model: what to build.
        dtype: type of the parameters and of the computation; the adapters are float32, as both libraries make them.
    """
    torch.manual_seed(0)
    network = model.build()
    network.config.use_cache = False
    for parameter in network.parameters():  # not .to(dtype), which would round the tables of positions as well
        parameter.data = parameter.data.to(dtype)
    # No dropout: the masks of two libraries differ, and their gradients are compared.
    lora = {
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "target_modules": sorted({attribute for _, attribute, _ in linears(network, model.head)}),
        "task_type": model.task_type,
    }
    adapted = ADAPT[library](network, model.head, dtype, lora)
    _seed_adapters(adapted)
    return adapted.train()


def linears(network: nn.Module, head: str) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, attribute, linear) of each linear layer outside the head."""
    return [
        (parent, attribute, child)
        for name, parent in network.named_modules()
        for attribute, child in parent.named_children()
        if isinstance(child, nn.Linear) and head not in f"{name}.{attribute}"
    ]


def _ours(network: Any, head: str, dtype: torch.dtype, lora: dict[str, Any]) -> Any:
    quantize_model(network, SPEC, skip_modules=[head])
    adapted = get_peft_model(network, LoraConfig(**lora))
    share_inputs(adapted, input_ids=torch.zeros((1, 2), dtype=torch.long, device=network.device))
    return adapted


def _peft(network: Any, head: str, dtype: torch.dtype, lora: dict[str, Any]) -> Any:
    import peft

    bnb: Any = import_module("bitsandbytes")

    for parent, attribute, linear in linears(network, head):
        shape = (linear.in_features, linear.out_features)
        layer = bnb.nn.Linear4bit(*shape, linear.bias is not None, dtype, True, "nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        layer.bias = linear.bias
        setattr(parent, attribute, layer.to(linear.weight.device))  # quantizes
    network.is_loaded_in_4bit = True  # what makes PEFT choose its bitsandbytes layer
    return peft.get_peft_model(network, peft.LoraConfig(**lora))


def _float(network: Any, head: str, dtype: torch.dtype, lora: dict[str, Any]) -> Any:
    """By PEFT where it is installed, since ours is on trial."""
    if find_spec("peft") is None:
        return get_peft_model(network, LoraConfig(**lora))
    import peft

    return peft.get_peft_model(network, peft.LoraConfig(**lora))


ADAPT: dict[str, Callable[[Any, str, torch.dtype, dict[str, Any]], Any]] = {OURS: _ours, PEFT: _peft, FLOAT: _float}


def _seed_adapters(network: nn.Module) -> None:
    """Give A and B the same values everywhere; B not zero, so that every gradient is alive."""
    for name, parameter in sorted(network.named_parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
