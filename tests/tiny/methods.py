"""One small case of every adapter method, and the bases it is put over."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import ferrolora as fl
from tiny import models

BASES: dict[str, fl.QuantSpec | None] = {
    "float32": None,
    "nf4+dq": fl.QuantSpec("nf4", 64, True),
    "fp4": fl.QuantSpec("fp4", 64, False),
    "int8": fl.QuantSpec("int8"),
}


@dataclass(frozen=True)
class Case:
    """A method with the options that a test of it uses.

    Attributes:
        config: name of the configuration class, the same here and in PEFT (if PEFT has it).
        options: its arguments.
        maker: makes the base model.
        inputs: what a batch of two rows has besides token ids.
        cannot: {check: why it cannot exist}; "check on base" narrows it.
    """

    config: str
    options: dict[str, Any]
    maker: Callable[[], nn.Module] = models.llama
    cannot: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    def ours(self) -> Any:
        """Our configuration."""
        return getattr(fl, self.config)(**self.options)

    def reason(self, check: str, base: str) -> str | None:
        """Why the check cannot be made over that base, or None."""
        packed = "packed" if base != "float32" else "float32"
        return next((self.cannot[key] for key in (check, f"{check} on {packed}") if key in self.cannot), None)


_TOKENS: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
_TARGETS = ["q_proj", "v_proj", "down_proj"]
_LOHA_IN_PEFT = "PEFT takes the shape of LoHa's matrices from the packed weight"
_NO_WEIGHT = {"merges": "virtual tokens have no place in a weight"}
_RESIDUAL = "PEFT cannot give a packed base its residual weight"

CASES: dict[str, Case] = {
    "LoRA": Case("LoraConfig", {"target_modules": _TARGETS, "r": 4}),
    "rsLoRA": Case("LoraConfig", {"target_modules": _TARGETS, "r": 4, "use_rslora": True}),
    "DoRA": Case("LoraConfig", {"target_modules": _TARGETS, "r": 4, "use_dora": True}),
    "LoRA with token rows": Case("LoraConfig", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3, 5]}),
    "PiSSA": Case(
        "LoraConfig",
        {"target_modules": _TARGETS, "r": 4, "init_lora_weights": "pissa"},
        cannot={"into PEFT on packed": _RESIDUAL, "from PEFT on packed": _RESIDUAL},
    ),
    "OLoRA": Case(
        "LoraConfig",
        {"target_modules": _TARGETS, "r": 4, "init_lora_weights": "olora"},
        cannot={"into PEFT on packed": _RESIDUAL, "from PEFT on packed": _RESIDUAL},
    ),
    "IA3": Case(
        "IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ),
    "LoHa": Case(
        "LoHaConfig",
        {"target_modules": _TARGETS, "r": 2},
        cannot={"into PEFT on packed": _LOHA_IN_PEFT, "from PEFT on packed": _LOHA_IN_PEFT},
    ),
    "AdaLoRA": Case("AdaLoraConfig", {"target_modules": _TARGETS, "init_r": 6, "target_r": 3, "total_step": 12}),
    "AdaMix": Case(
        "AdaMixConfig",
        {"target_modules": "all-linear", "r": 4, "num_experts": 2},
        cannot={"from PEFT": "PEFT has no AdaMix; its LoRA files are read as LoRA"},
    ),
    "MEFT": Case(
        "ReversibleConfig",
        {"r": 8},
        cannot={
            "into PEFT": "PEFT has no MEFT",
            "from PEFT": "PEFT has no MEFT",
            "merges": "MEFT changes how layers are connected, not a weight",
        },
    ),
    "Prompt tuning": Case("PromptTuningConfig", _TOKENS, cannot=_NO_WEIGHT),
    "P-tuning, MLP": Case("PromptEncoderConfig", _TOKENS, cannot=_NO_WEIGHT),
    "P-tuning, LSTM": Case(
        "PromptEncoderConfig", _TOKENS | {"encoder_reparameterization_type": "LSTM"}, cannot=_NO_WEIGHT
    ),
    "Prefix tuning": Case("PrefixTuningConfig", _TOKENS, cannot=_NO_WEIGHT),
    "Prefix tuning, projected": Case("PrefixTuningConfig", _TOKENS | {"prefix_projection": True}, cannot=_NO_WEIGHT),
    "Multitask prompt tuning": Case(
        "MultitaskPromptTuningConfig",
        _TOKENS | {"num_tasks": 2, "num_ranks": 2},
        cannot=_NO_WEIGHT,
        inputs={"task_ids": torch.tensor([0, 1])},
    ),
}


def base_of(kind: str, maker: Callable[[], nn.Module] = models.llama) -> nn.Module:
    """A model with its linear layers stored as `kind` says."""
    spec = BASES[kind]
    return maker() if spec is None else fl.quantize_model(maker(), spec)


def float_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a float model by name, as initializers over a packed copy of it want them."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def perturb(model: nn.Module, scale: float = 0.1) -> None:
    """Makes every trained parameter count: what starts at zero would hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
