"""LoRA: a low-rank matrix beside a linear layer or an embedding."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ferrolora.adapters.base import AdapterLayer, adapter_dtype, check_adapter_name
from ferrolora.adapters.config import PeftConfig
from ferrolora.adapters.init import initializer
from ferrolora.adapters.lora_config import LoraConfig as LoraConfig
from ferrolora.errors import TargetError, UnsupportedError
from ferrolora.ops.linear import LowRank


class LowRankBase(Protocol):
    """A linear layer that computes base and low-rank branch in one call."""

    def forward_with_low_rank(self, x: Tensor, lora: LowRank) -> Tensor:
        """base(x) + scaling·B(A(drop(x))): x [..., in] → [..., out]."""


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's Conv1D: y = x·W + b with W [in, out] (`nx` in, `nf` out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nx") and hasattr(module, "nf")


def wrap(module: nn.Module, path: str) -> AdapterLayer:
    """Puts the LoRA wrapper that fits around `module`.

    Raises:
        TargetError: the module, at `path` in the model, is of a type that LoRA is not implemented for.
        UnsupportedError: the module is never called, so an adapter on it would do nothing.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise UnsupportedError(f"{path}: nn.MultiheadAttention reads the weight of out_proj without calling it")
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        return LoraLinear(module)
    if isinstance(module, nn.Embedding):
        return LoraEmbedding(module)
    raise TargetError(
        f"{path} is a {type(module).__name__}; LoRA adapts nn.Linear, Conv1D and nn.Embedding. "
        "Narrow target_modules, or name it in exclude_modules"
    )


class LoraLayer(AdapterLayer):
    """What LoRA on any module shares: rank, alpha and scaling of each adapter."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}

    def _configure(self, name: str, config: PeftConfig, path: str) -> LoraConfig:
        check_adapter_name(name)
        if not isinstance(config, LoraConfig):
            raise UnsupportedError(f"{path} has LoRA adapters; {config.peft_type} cannot be added to it")
        if name in self.adapter_names():
            raise TargetError(f"{path} has an adapter {name!r} already")
        if self.merged:
            raise UnsupportedError(f"{self.merged_adapters} are merged; call unmerge_adapter() before adding {name!r}")
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        self.r[name], self.lora_alpha[name], self.lora_dropout[name] = r, alpha, config.lora_dropout
        self.scaling[name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        return config

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        for values in (self.r, self.lora_alpha, self.lora_dropout, self.scaling):
            values.pop(name, None)

    def _active(self) -> list[str]:
        return self.active_adapters if self.adapters_enabled else []


class LoraLinear(LoraLayer):
    """y = base(x) + Σ s·B(A(drop(x))) over the active adapters.

    One active adapter over a base that offers `forward_with_low_rank` is one fused call.
    """

    containers = ("lora_A", "lora_B")
    merged_A: Tensor | None
    merged_B: Tensor | None
    merged_bias: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.transposed = is_transposed_linear(base_layer)
        source: Any = base_layer
        self.in_features: int = source.nx if self.transposed else source.in_features
        self.out_features: int = source.nf if self.transposed else source.out_features
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self._fused = hasattr(base_layer, "forward_with_low_rank")
        for buffer in ("merged_A", "merged_B", "merged_bias"):
            self.register_buffer(buffer, None, persistent=False)

    def add_adapter(self, name: str, config: PeftConfig, path: str, autocast_dtype: bool) -> None:
        lora = self._configure(name, config, path)
        a = nn.Linear(self.in_features, self.r[name], bias=False)
        b = nn.Linear(self.r[name], self.out_features, bias=lora.lora_bias)
        initializer(lora.init_lora_weights)(a.weight, b.weight)
        if lora.lora_bias and lora.init_lora_weights is not False:
            nn.init.zeros_(b.bias)
        dtype = adapter_dtype(self.base_layer, autocast_dtype)
        self.lora_A[name] = a.to(self.weight.device, dtype)
        self.lora_B[name] = b.to(self.weight.device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out] in the type of the base's own output."""
        if self.merged and self.adapters_enabled:
            return self._forward_merged(x)
        active = self._active()
        if len(active) == 1 and self._fused and self._pair(active[0])[1].bias is None:
            return cast(LowRankBase, self.base_layer).forward_with_low_rank(x, self._low_rank(active[0]))
        base: Tensor = self.base_layer(x)
        y = base
        for name in active:
            a, b = self._pair(name)
            dropped = F.dropout(x.to(a.weight.dtype), self.lora_dropout[name], self.training)
            y = y + b(a(dropped)) * self.scaling[name]
        return y.to(base.dtype)

    def delta_weight(self, name: str) -> Tensor:
        a, b = (part.weight.detach() for part in self._pair(name))
        dtype = torch.promote_types(a.dtype, torch.float32)
        delta = (b.to(dtype) @ a.to(dtype)) * self.scaling[name]
        return delta.T if self.transposed else delta

    def delta_bias(self, name: str) -> Tensor | None:
        bias: Tensor | None = self._pair(name)[1].bias
        return None if bias is None else bias.detach() * self.scaling[name]

    def keep_beside(self, names: Sequence[str]) -> None:
        """Stacks the adapters into one of rank Σ r with the scaling in B: the same delta, a fraction of its size."""
        if not self._fused:
            super().keep_beside(names)
        a = [self._pair(name)[0].weight.detach() for name in names]
        b = [self._pair(name)[1].weight.detach() * self.scaling[name] for name in names]
        self.merged_A, self.merged_B = torch.cat(a), torch.cat(b, dim=1)  # [Σr, in], [out, Σr]
        biases = [delta for delta in map(self.delta_bias, names) if delta is not None]
        self.merged_bias = torch.stack(biases).sum(0) if biases else None

    def drop_beside(self) -> None:
        self.merged_A = self.merged_B = self.merged_bias = None

    def _pair(self, name: str) -> tuple[nn.Linear, nn.Linear]:
        return cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])

    def _low_rank(self, name: str) -> LowRank:
        a, b = self._pair(name)
        return LowRank(a.weight, b.weight, self.scaling[name], self.lora_dropout[name] if self.training else 0.0)

    def _forward_merged(self, x: Tensor) -> Tensor:
        if self.merged_A is None or self.merged_B is None:
            merged: Tensor = self.base_layer(x)
            return merged
        low_rank = LowRank(self.merged_A, self.merged_B, 1.0, 0.0)
        y = cast(LowRankBase, self.base_layer).forward_with_low_rank(x, low_rank)
        return y if self.merged_bias is None else (y + self.merged_bias).to(y.dtype)


class LoraEmbedding(LoraLayer):
    """y = W[ids] + Σ s·Aᵀ[ids]·Bᵀ over the active adapters, with A [r, vocabulary] and B [dim, r].

    A starts at zero and B at N(0, 1): the part that is looked up is the one that starts at zero.
    """

    containers = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    def add_adapter(self, name: str, config: PeftConfig, path: str, autocast_dtype: bool) -> None:
        lora = self._configure(name, config, path)
        if lora.lora_bias:
            raise UnsupportedError(f"{path}: lora_bias=True is not possible on an embedding")
        vocabulary, dim = self.weight.shape
        keep_random = lora.init_lora_weights is False
        a = torch.randn(self.r[name], vocabulary) if keep_random else torch.zeros(self.r[name], vocabulary)
        b = torch.randn(dim, self.r[name])
        device, dtype = self.weight.device, adapter_dtype(self.base_layer, autocast_dtype)
        self.lora_embedding_A[name] = nn.Parameter(a.to(device, dtype))
        self.lora_embedding_B[name] = nn.Parameter(b.to(device, dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., dim] in the type of the base's own output."""
        base: Tensor = self.base_layer(ids)
        if self.merged and self.adapters_enabled:
            return base
        y, scale = base, getattr(self.base_layer, "embed_scale", None)
        for name in self._active():
            after_a = F.embedding(ids, self.lora_embedding_A[name].T, self.base_layer.padding_idx)  # type: ignore[arg-type]
            delta = (after_a @ self.lora_embedding_B[name].T) * self.scaling[name]
            y = y + (delta if scale is None else delta * scale)
        return y.to(base.dtype)

    def delta_weight(self, name: str) -> Tensor:
        a, b = self.lora_embedding_A[name].detach(), self.lora_embedding_B[name].detach()
        dtype = torch.promote_types(a.dtype, torch.float32)
        delta: Tensor = (b.to(dtype) @ a.to(dtype)).T * self.scaling[name]
        return delta


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    r"""The value of the first pattern that matches `path` as `(.*\.)?pattern$`, else `default`."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default
