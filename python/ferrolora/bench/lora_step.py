"""Forward and backward of one layer with a low-rank branch, by each library: what `lora` times and weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ferrolora.bench.contender import OURS, PEFT, TORCH
from ferrolora.bench.inputs import activations, bitsandbytes_layer, low_rank, output_gradient, weight
from ferrolora.bench.problem import RANK, SCALING, Problem
from ferrolora.ops.linear import LowRank, linear

Step = Callable[[], tuple[Tensor, ...]]  # y, dX and, with a branch, dA, dB


def ferrolora_step(problem: Problem) -> Step:
    """The fused operator."""
    x, dy, packed = activations(problem).requires_grad_(), output_gradient(problem), weight(problem).packed
    a, b = (factor.requires_grad_() for factor in low_rank(problem))
    return _both_ways(lambda: linear(x, packed, lora=LowRank(a, b, SCALING)), (x, a, b), dy)


def peft_step(problem: Problem) -> Step:
    """PEFT's LoRA layer over bitsandbytes' Linear4bit, without dropout."""
    import peft

    x, dy = activations(problem).requires_grad_(), output_gradient(problem)
    model: Any = nn.ModuleDict({"proj": bitsandbytes_layer(weight(problem).packed, x.dtype)})
    model.is_loaded_in_4bit = True  # what makes PEFT choose its bitsandbytes layer
    config = peft.LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), lora_dropout=0.0, target_modules=["proj"])
    adapted: Any = peft.inject_adapter_in_model(config, model)
    layer = adapted["proj"].train()
    factors = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    for factor, value in zip(factors, low_rank(problem), strict=True):
        factor.data = value  # float32, which PEFT makes adapters of a 16-bit model too
    return _both_ways(lambda: layer(x), (x, *factors), dy)


def torch_step(problem: Problem) -> Step:
    """The dense layer alone: no quantization and no branch."""
    x, dy, dense = activations(problem).requires_grad_(), output_gradient(problem), weight(problem).dense
    return _both_ways(lambda: F.linear(x, dense), (x,), dy)


STEPS: dict[str, Callable[[Problem], Step]] = {OURS: ferrolora_step, PEFT: peft_step, TORCH: torch_step}


def _both_ways(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> Step:
    def run() -> tuple[Tensor, ...]:
        y = forward()
        return y, *torch.autograd.grad(y, inputs, dy)

    return run
