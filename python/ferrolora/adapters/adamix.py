"""AdaMix: several copies of LoRA's matrices, one of each in a step; their mean in the end."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferrolora.adapters.base import AdapterLayer, WeightSource, adapter_dtype
from ferrolora.adapters.config import PeftConfig, PeftType, pattern_value
from ferrolora.adapters.init import initializer
from ferrolora.adapters.init.start import Start
from ferrolora.adapters.lora import is_transposed_linear, refuse_uncalled
from ferrolora.adapters.lora_config import LoraConfig
from ferrolora.adapters.low_rank_linear import LowRankLinear
from ferrolora.errors import TargetError, UnsupportedError


@dataclass
class AdaMixConfig(LoraConfig):
    """y = W·x + s·B_j·A_i·drop(x): in every training pass each layer picks an i and a j; else the means of all.

    The training loss gets the symmetric KL divergence between two passes with different picks. A file holds the means:
    an ordinary LoRA adapter.

    Args:
        num_experts: copies of A and of B. Default 4.
        consistency_weight: of the divergence in the loss. Default 1.

    The other fields are those of `LoraConfig`; DoRA, `lora_bias` and starts other than True, False and "gaussian" do
    not apply.

    Raises:
        UnsupportedError: a field that does not apply, or fewer than two copies.

    Source: AdaMix, arXiv 2205.12410.
    """

    num_experts: int = 4
    consistency_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ADAMIX
        if self.num_experts < 2 or self.consistency_weight < 0:
            raise UnsupportedError("AdaMixConfig: num_experts must be at least 2, consistency_weight not negative")
        if self.use_dora or self.lora_bias or self.init_lora_weights not in (True, False, "gaussian"):
            raise UnsupportedError("AdaMixConfig: use_dora, lora_bias and starts from the weight do not apply")

    def saved_as(self) -> PeftConfig:
        """The LoRA configuration that a file gets."""
        fields = {key: value for key, value in self.to_dict().items() if key not in _OWN_FIELDS}
        return LoraConfig(**fields | {"peft_type": PeftType.LORA})


_OWN_FIELDS = ("num_experts", "consistency_weight")


def wrap(module: nn.Module, path: str, config: PeftConfig | None = None) -> AdapterLayer:
    """Puts the AdaMix wrapper around `module`. Raises TargetError for a type it is not implemented for."""
    refuse_uncalled(module, path)
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        return AdaMixLayer(module)
    raise TargetError(f"{path} is a {type(module).__name__}; AdaMix adapts nn.Linear and Conv1D")


class AdaMixLayer(LowRankLinear):
    """y = base(x) + Σ s·B_j(A_i(drop(x))) over the adapters, with `adamix_A` [M, r, in] and `adamix_B` [M, out, r]."""

    containers = ("adamix_A", "adamix_B")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.adamix_A = nn.ParameterDict()
        self.adamix_B = nn.ParameterDict()
        self.picks: dict[str, tuple[int, int]] = {}

    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        self.check_new(name, path)
        if not isinstance(config, AdaMixConfig):
            raise UnsupportedError(f"{path} has AdaMix adapters; {config.peft_type} cannot be added to it")
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        self.scaling[name] = alpha / r**0.5 if config.use_rslora else alpha / r
        self.lora_dropout[name] = config.lora_dropout
        into, out = self.in_features, self.out_features
        # All copies start alike and part by what they are picked for: the mean of unrelated matrices would be no use.
        one_a, one_b = 0.02 * torch.randn(r, into), 0.02 * torch.randn(out, r)
        start = Start(one_a, one_b, self.scaling[name], config.init_lora_weights, self.float_weight, torch.clone)
        initializer(config.init_lora_weights)(start)
        a, b = one_a.repeat(config.num_experts, 1, 1), one_b.repeat(config.num_experts, 1, 1)
        dtype = adapter_dtype(self.base_layer, autocast_dtype)
        self.adamix_A[name] = nn.Parameter(a.to(self.weight.device, dtype))
        self.adamix_B[name] = nn.Parameter(b.to(self.weight.device, dtype))

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self.picks.pop(name, None)

    def pick(self, name: str) -> None:
        """Chooses, by torch's generator, which A and which B the next training passes use."""
        count = self.adamix_A[name].shape[0]
        i, j = torch.randint(0, count, (2,)).tolist()
        self.picks[name] = (i, j)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]): the picked ones in training, else the means."""
        a, b = self.entry("adamix_A", name), self.entry("adamix_B", name)
        if self.training and name in self.picks and not self.merged:
            i, j = self.picks[name]
            return a[i], b[j]
        return self.merged_factors(name)

    def merged_factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.entry("adamix_A", name).mean(0), self.entry("adamix_B", name).mean(0)

    def to_file(self, name: str, tensors: dict[str, Tensor], config: PeftConfig, path: str) -> dict[str, Tensor]:
        """The means under LoRA's keys."""
        return {"lora_A.weight": tensors["adamix_A"].mean(0), "lora_B.weight": tensors["adamix_B"].mean(0)}


def two_passes(
    run: Callable[[], Any],
    layers: Iterable[AdapterLayer],
    name: str,
    config: PeftConfig,
    inputs: Mapping[str, Any],
) -> Any:
    """A training pass with fresh picks; if it has a loss, also a second one, and their divergence in the loss."""
    assert isinstance(config, AdaMixConfig)
    mixed = [layer for layer in layers if isinstance(layer, AdaMixLayer) and name in layer.adamix_A]

    def again() -> Any:
        for layer in mixed:
            layer.pick(name)
        return run()

    first = again()
    if not isinstance(getattr(first, "loss", None), Tensor) or config.consistency_weight == 0:
        return first
    divergence = symmetric_divergence(first.logits, again().logits, inputs.get("labels"))
    first.loss = first.loss + config.consistency_weight * divergence
    return first


def symmetric_divergence(left: Tensor, right: Tensor, labels: Tensor | None = None) -> Tensor:
    """½·(KL(p‖q) + KL(q‖p)), the mean over positions; those whose label is -100 do not count.

    Args:
        left: logits `[..., V]` of p.
        right: logits `[..., V]` of q.
        labels: `[...]`, or None: all positions count.
    """
    p, q = F.log_softmax(left.float(), -1), F.log_softmax(right.float(), -1)
    each = 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1)
    if labels is None or labels.shape != each.shape:
        return each.mean()
    counted = labels != -100
    return (each * counted).sum() / counted.sum().clamp_min(1)
