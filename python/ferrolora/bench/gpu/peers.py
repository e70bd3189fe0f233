"""The other libraries' calls on a GPU. Each maker returns one call for each copy of the operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ferrolora.bench.gpu.goals import BITSANDBYTES, PEFT, RANK, UNSLOTH
from ferrolora.ops.linear import LowRank

Call = Callable[[], Any]
NEEDS = {BITSANDBYTES: ("bitsandbytes",), PEFT: ("peft", "bitsandbytes"), UNSLOTH: ("unsloth", "bitsandbytes")}
NOT_INSTALLED = "not installed"


def add_peer(
    name: str, make: Callable[[], Sequence[Call]], calls: dict[str, Sequence[Call]], notes: dict[str, str]
) -> None:
    """Put a peer's calls among the contenders, or note why it cannot take part.

    Args:
        name: of the peer, a key of NEEDS.
        make: makes its calls.
        calls: gets them, if the first of them runs.
        notes: else gets "not installed", or the error, which stands in the result in place of a figure.
    """
    if not is_installed(name):
        notes[name] = NOT_INSTALLED
        return
    try:
        made = make()
        made[0]()
    except Exception as error:  # noqa: BLE001  # what another library cannot do stands in the result
        notes[name] = failure(error)
        return
    calls[name] = made


def is_installed(name: str) -> bool:
    """Whether a peer's packages are here."""
    return all(find_spec(package) is not None for package in NEEDS[name])


def failure(error: Exception) -> str:
    """An error in one line of a result."""
    return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def decoders(weights: Sequence[Tensor]) -> list[Call]:
    """bitsandbytes' dequantize of each weight."""
    functional: Any = import_module("bitsandbytes.functional")
    return [partial(functional.dequantize_4bit, *packed(weight)) for weight in weights]


def products(x: Tensor, weights: Sequence[Tensor]) -> list[Call]:
    """bitsandbytes' product of x with each weight."""
    bnb: Any = import_module("bitsandbytes")
    theirs = [packed(weight) for weight in weights]
    return [partial(bnb.matmul_4bit, x, codes.t(), quant_state=state) for codes, state in theirs]


def packed(weight: Tensor) -> tuple[Tensor, Any]:
    """bitsandbytes' NF4 with double quantization of a weight."""
    functional: Any = import_module("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return codes, state


def peft_step(x: Tensor, weight: Tensor, lora: LowRank, dy: Tensor) -> list[Call]:
    """PEFT's own layer over bitsandbytes' Linear4bit, under autocast, as the Trainer runs it in bfloat16."""
    bnb: Any = import_module("bitsandbytes")
    peft: Any = import_module("peft")
    n, k = weight.shape
    layer = bnb.nn.Linear4bit(k, n, False, x.dtype, True, "nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    model: Any = nn.ModuleDict({"proj": layer.to(x.device)})  # quantizes
    model.is_loaded_in_4bit = True  # what makes PEFT choose its bitsandbytes layer
    config = peft.LoraConfig(r=RANK, lora_alpha=int(lora.scaling * RANK), lora_dropout=0.0, target_modules=["proj"])
    adapted: Any = peft.inject_adapter_in_model(config, model)["proj"].to(x.device).train()
    adapted.lora_A["default"].weight.data, adapted.lora_B["default"].weight.data = lora.A.detach(), lora.B.detach()

    def step() -> None:
        with torch.autocast(x.device.type, x.dtype):
            y = adapted(x)
        y.backward(dy)

    return [step]


def unsloth_step(x: Tensor, weight: Tensor, lora: LowRank, dy: Tensor) -> list[Call]:
    """Unsloth's autograd function for one projection, over bitsandbytes' bytes."""
    fast: Any = import_module("unsloth.kernels.fast_lora")
    codes, state = packed(weight)
    a, b = (factor.detach().clone().requires_grad_() for factor in (lora.A, lora.B))

    def step() -> None:  # it takes [batch, tokens, k]
        with torch.autocast(x.device.type, x.dtype):
            y = fast.LoRA_W.apply(x[None], codes, state, a, b, lora.scaling)
        y.backward(dy[None])

    return [step]
