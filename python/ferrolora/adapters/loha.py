"""LoHa: a delta that is the Hadamard product of two low-rank matrices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferrolora.adapters.base import AdapterLayer, WeightSource, adapter_dtype
from ferrolora.adapters.config import LayerConfig, PeftConfig, PeftType, check_alpha, check_rank, pattern_value
from ferrolora.adapters.conv import CONVOLUTIONS, convolve
from ferrolora.adapters.lora import linear_features, refuse_uncalled
from ferrolora.adapters.lora_layer import LowRankBase
from ferrolora.errors import TargetError, UnsupportedError
from ferrolora.ops.linear import LowRank

_PAIRS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


@dataclass
class LoHaConfig(LayerConfig):
    """ΔW = (w1_a·w1_b)⊙(w2_a·w2_b)·alpha/r, of rank up to r².

    Args:
        r: rank of each factor: w_a [out, r], w_b [r, in]. Default 8.
        alpha: numerator of the scaling. Default 8.
        rank_dropout: probability that an output row of ΔW is dropped while training; the others grow so that their
            mean weight stays one. Default 0.
        module_dropout: probability that a module's whole ΔW is left out of a training step. Default 0.
        use_effective_conv2d: for kernels larger than 1, Tucker cores t1, t2 [r, r, kh, kw]. Default False.
        init_weights: False draws w2_b like the others, so that ΔW is not zero. Default True.
        rank_pattern: {name pattern: r}, as in `LoraConfig`.
        alpha_pattern: {name pattern: alpha}.

    The other fields are those of `LoraConfig`.

    Raises:
        UnsupportedError: a number outside its range.

    Source: FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOHA
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            check_rank("LoHaConfig", name, rank)
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            check_alpha("LoHaConfig", name, alpha)
        for name in ("rank_dropout", "module_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UnsupportedError(f"LoHaConfig({name}={getattr(self, name)!r}) is outside [0, 1)")


def wrap(module: nn.Module, path: str, config: PeftConfig | None = None) -> AdapterLayer:
    """Puts the LoHa wrapper around `module`. Raises TargetError for a type that LoHa is not implemented for."""
    refuse_uncalled(module, path)
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return LoHaLayer(module)
    raise TargetError(f"{path} is a {type(module).__name__}; LoHa adapts nn.Linear, nn.Conv1d and nn.Conv2d")


class LoHaLayer(AdapterLayer):
    """y = base(x) + Σ ΔW·x over the adapters.

    On a linear layer with r²·(in + out) < in·out the delta is not formed: the Hadamard product of two matrices of
    rank r is a product B·A of rank r², A_ij = w1_b_i⊙w2_b_j and B_ij = w1_a_i⊙w2_a_j, which a base that offers
    `forward_with_low_rank` computes with its own product in one fused call.
    """

    containers = (*_PAIRS, *_CORES)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        for container in self.containers:
            self.add_module(container, nn.ParameterDict())
        self.scaling: dict[str, float] = {}
        self.rank_dropout: dict[str, float] = {}
        self.module_dropout: dict[str, float] = {}

    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        self.check_new(name, path)
        if not isinstance(config, LoHaConfig):
            raise UnsupportedError(f"{path} has LoHa adapters; {config.peft_type} cannot be added to it")
        r = pattern_value(config.rank_pattern, path, config.r)
        self.scaling[name] = pattern_value(config.alpha_pattern, path, config.alpha) / r
        self.rank_dropout[name], self.module_dropout[name] = config.rank_dropout, config.module_dropout
        dtype = adapter_dtype(self.base_layer, autocast_dtype)
        for container, shape in self._shapes(r, config.use_effective_conv2d).items():
            values = torch.empty(shape)
            if container == "hada_w2_b" and config.init_weights:
                nn.init.zeros_(values)
            else:
                nn.init.kaiming_uniform_(values, a=math.sqrt(5))
            self.entries(container)[name] = nn.Parameter(values.to(self.weight.device, dtype))

    def _shapes(self, r: int, effective: bool) -> dict[str, tuple[int, ...]]:
        base: Any = self.base_layer
        if not isinstance(base, CONVOLUTIONS):
            into, out = linear_features(base)
        else:
            kernel = tuple(base.kernel_size)
            if effective and math.prod(kernel) > 1:
                out, into = base.out_channels, base.in_channels // base.groups
                core = (r, r, *kernel) if len(kernel) == 2 else (r, r, *kernel, 1)
                pairs = {"hada_w1_a": (r, out), "hada_w1_b": (r, into), "hada_w2_a": (r, out), "hada_w2_b": (r, into)}
                return dict.fromkeys(_CORES, core) | pairs
            out, into = base.out_channels, base.in_channels // base.groups * math.prod(kernel)
        return {"hada_w1_a": (out, r), "hada_w1_b": (r, into), "hada_w2_a": (out, r), "hada_w2_b": (r, into)}

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        for values in (self.scaling, self.rank_dropout, self.module_dropout):
            values.pop(name, None)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """x of the base's input shape → the base's output shape and type."""
        counted = [name for name in names if not self._left_out(name)]
        fusible = hasattr(self.base_layer, "forward_with_low_rank") and len(counted) == 1
        if fusible and self._low_rank_pays(counted[0]) and not self._drops_rows(counted[0]):
            low_rank = LowRank(*self.khatri_rao(counted[0]), self.scaling[counted[0]], 0.0)
            return cast(LowRankBase, self.base_layer).forward_with_low_rank(x, low_rank)
        base: Tensor = self.base_layer(x)
        y = base
        for name in counted:
            y = y + self._branch(x, name)
        return y.to(base.dtype)

    def weight_with(self, names: Sequence[str], weight: Tensor) -> Tensor:
        total = weight.clone()
        for name in names:
            total += self.delta_weight(name).detach().view(total.shape)
        return total

    def delta_weight(self, name: str) -> Tensor:
        """ΔW in the layout of the base weight."""
        w1_a, w1_b, w2_a, w2_b = (self.entry(container, name) for container in _PAIRS)
        if name in self.entries("hada_t1"):
            t1, t2 = (self.entry(core, name) for core in _CORES)
            first = torch.einsum("ijkl,jb,ia->abkl", t1, w1_b, w1_a)
            second = torch.einsum("ijkl,jb,ia->abkl", t2, w2_b, w2_a)
        else:
            first, second = w1_a @ w1_b, w2_a @ w2_b
        delta: Tensor = first * second * self.scaling[name]
        base: Any = self.base_layer
        return delta.view(self.weight.shape) if isinstance(base, CONVOLUTIONS) else delta

    def khatri_rao(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r², in], B [out, r²]) with B·A = (w1_a·w1_b)⊙(w2_a·w2_b)."""
        w1_a, w1_b, w2_a, w2_b = (self.entry(container, name) for container in _PAIRS)
        a = (w1_b[:, None] * w2_b[None]).flatten(0, 1)
        b = (w1_a[:, :, None] * w2_a[:, None]).flatten(1)
        return a, b

    def _branch(self, x: Tensor, name: str) -> Tensor:
        dtype = self.entry("hada_w1_a", name).dtype
        if self._low_rank_pays(name):
            a, b = self.khatri_rao(name)
            y = F.linear(F.linear(x.to(dtype), a), b) * self.scaling[name]
        elif isinstance(self.base_layer, CONVOLUTIONS):
            y = convolve(self.base_layer, x, self.delta_weight(name))
        else:
            y = F.linear(x.to(dtype), self.delta_weight(name))
        return y * self._row_mask(name, y) if self._drops_rows(name) else y

    def _low_rank_pays(self, name: str) -> bool:
        if isinstance(self.base_layer, CONVOLUTIONS):
            return False
        r, (into, out) = self.entry("hada_w1_b", name).shape[0], linear_features(self.base_layer)
        return bool(r * r * (into + out) < into * out)

    def _left_out(self, name: str) -> bool:
        probability = self.module_dropout[name]
        return self.training and probability > 0.0 and bool(torch.rand(()) <= probability)

    def _drops_rows(self, name: str) -> bool:
        return self.training and self.rank_dropout[name] > 0.0

    def _row_mask(self, name: str, y: Tensor) -> Tensor:
        is_conv = isinstance(self.base_layer, CONVOLUTIONS)
        out = y.shape[1] if is_conv else y.shape[-1]
        kept = (torch.rand(out, device=y.device) > self.rank_dropout[name]).to(y.dtype)
        mask = kept / kept.mean().clamp_min(1 / out)
        return mask.view(-1, *[1] * (y.dim() - 2)) if is_conv else mask
