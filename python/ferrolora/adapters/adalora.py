"""AdaLoRA: a delta in the form of a singular value decomposition, whose rank goes where it matters."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ferrolora.adapters.base import AdapterLayer, WeightSource, adapter_dtype
from ferrolora.adapters.config import PeftConfig, PeftType, check_rank, pattern_value
from ferrolora.adapters.lora import is_transposed_linear, refuse_uncalled
from ferrolora.adapters.lora_config import LoraConfig
from ferrolora.adapters.low_rank_linear import LowRankLinear
from ferrolora.errors import TargetError, UnsupportedError

_EPSILON = 1e-5  # keeps the scaling of a module whose rank went to zero finite; PEFT's value


@dataclass
class AdaLoraConfig(LoraConfig):
    """ΔW = B·(A⊙E)·alpha/ranknum with singular values E; modules compete for a shrinking budget of them.

    Args:
        target_r: mean rank of a module at the end. Default 8.
        init_r: rank at the start. Default 12.
        tinit: steps before the budget shrinks. Default 0.
        tfinal: steps at the end during which the ranks stay. Default 0.
        deltaT: steps between two allocations. Default 1.
        beta1: smoothing of the sensitivity |w·∂L/∂w|, in (0, 1). Default 0.85.
        beta2: smoothing of its uncertainty. Default 0.85.
        orth_reg_weight: weight of the penalty ‖A·Aᵀ − I‖ + ‖Bᵀ·B − I‖ in the training loss. Default 0.5.
        total_step: optimizer steps of the whole training; required.
        rank_pattern: written by the allocation: which singular values each module keeps.

    `r` is not used. The other fields are those of `LoraConfig`; DoRA and the initializers do not apply.

    Raises:
        UnsupportedError: no `total_step`, a schedule without a phase of allocation, or a field of LoRA that does
            not apply.

    Source: AdaLoRA, arXiv 2303.10512.
    """

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # the name in PEFT's file
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Any = None

    def __post_init__(self) -> None:
        pattern, self.rank_pattern = self.rank_pattern, {}
        super().__post_init__()
        self.rank_pattern = pattern
        self.peft_type = PeftType.ADALORA
        check_rank("AdaLoraConfig", "target_r", self.target_r)
        check_rank("AdaLoraConfig", "init_r", self.init_r)
        if self.total_step is None or self.total_step < 1:
            raise UnsupportedError(f"AdaLoraConfig(total_step={self.total_step!r}): give the number of training steps")
        if self.tinit >= self.total_step - self.tfinal:
            raise UnsupportedError(
                f"AdaLoraConfig: tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step="
                f"{self.total_step} for allocating ranks"
            )
        for name in ("beta1", "beta2"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise UnsupportedError(f"AdaLoraConfig({name}={getattr(self, name)!r}) is outside (0, 1)")
        if self.orth_reg_weight < 0 or self.deltaT < 1:
            raise UnsupportedError("AdaLoraConfig: orth_reg_weight must not be negative, deltaT at least 1")
        if self.use_dora or self.lora_bias or self.init_lora_weights not in (True, False):
            raise UnsupportedError("AdaLoraConfig: use_dora, lora_bias and init_lora_weights by name do not apply")


def wrap(module: nn.Module, path: str, config: PeftConfig | None = None) -> AdapterLayer:
    """Puts the AdaLoRA wrapper around `module`. Raises TargetError for a type it is not implemented for."""
    refuse_uncalled(module, path)
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        return AdaLoraLayer(module)
    raise TargetError(f"{path} is a {type(module).__name__}; AdaLoRA adapts nn.Linear and Conv1D")


class AdaLoraLayer(LowRankLinear):
    """y = base(x) + Σ B·((A⊙E)·drop(x))·alpha/(ranknum + 1e-5) over the adapters; ranknum is the rank at the start."""

    containers = ("lora_A", "lora_B", "lora_E")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for container in self.containers:
            self.add_module(container, nn.ParameterDict())

    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        self.check_new(name, path)
        if not isinstance(config, AdaLoraConfig):
            raise UnsupportedError(f"{path} has AdaLoRA adapters; {config.peft_type} cannot be added to it")
        r = config.init_r
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        self.scaling[name] = (alpha if alpha > 0 else float(r)) / (r + _EPSILON)
        self.lora_dropout[name] = config.lora_dropout
        # drawn in PEFT's order (it also draws its rank counter), so that a seed starts the same adapter there and here
        a, e, b = torch.randn(r, self.in_features), torch.randn(r, 1), torch.randn(self.out_features, r)
        torch.randn(1)
        if config.init_lora_weights:
            nn.init.zeros_(e)
            nn.init.normal_(a, std=0.02)
            nn.init.normal_(b, std=0.02)
        dtype = adapter_dtype(self.base_layer, autocast_dtype)
        for container, values in zip(self.containers, (a, b, e), strict=True):
            self.entries(container)[name] = nn.Parameter(values.to(self.weight.device, dtype))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A⊙E [r, in], B [out, r])."""
        a, b, e = (self.entry(container, name) for container in self.containers)
        return a * e, b

    def penalty(self, name: str) -> list[Tensor]:
        """‖A·Aᵀ − I‖ and ‖Bᵀ·B − I‖ (Frobenius)."""
        a, b = self.entry("lora_A", name), self.entry("lora_B", name)
        identity = torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
        return [torch.linalg.norm(a @ a.T - identity), torch.linalg.norm(b.T @ b - identity)]

    def to_file(self, name: str, tensors: dict[str, Tensor], config: PeftConfig, path: str) -> dict[str, Tensor]:
        """Only the singular values that the allocation kept, as PEFT has it."""
        kept = _kept(config, path)
        if kept is None or tensors["lora_E"].shape[0] == int(kept.sum()):
            return tensors
        return {key: value[:, kept].contiguous() if key == "lora_B" else value[kept] for key, value in tensors.items()}

    def make_room(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Takes the rank of a file whose singular values were pruned; the scaling stays that of the start."""
        if "lora_E" in tensors and tensors["lora_E"].shape[0] < self.entries("lora_E")[name].shape[0]:
            for container in self.containers:
                old = self.entries(container)[name]
                self.entries(container)[name] = nn.Parameter(
                    torch.empty(tensors[container].shape, dtype=old.dtype, device=old.device), old.requires_grad
                )


def orthogonal_penalty(layers: Iterable[AdapterLayer], name: str, config: PeftConfig) -> Tensor | None:
    """orth_reg_weight times the mean over all A and B of adapter `name`; None if there are none."""
    assert isinstance(config, AdaLoraConfig)
    terms = [
        term
        for layer in layers
        if isinstance(layer, AdaLoraLayer) and name in layer.entries("lora_E")
        for term in layer.penalty(name)
    ]
    return torch.stack(terms).mean() * config.orth_reg_weight if terms else None


def _kept(config: PeftConfig, path: str) -> Tensor | None:
    """Which singular values of the module at `path` the allocation kept; None before the first allocation."""
    pattern = getattr(config, "rank_pattern", None) or {}
    mask = pattern.get(f"{path}.lora_E")
    return None if mask is None else torch.tensor(mask, dtype=torch.bool)
