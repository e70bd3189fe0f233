"""LoRA on the matrices of fused experts: `LoraConfig(target_parameters=["experts.gate_up_proj", …])`.

    W_e ← W_e + s·B_e·A_e      A [E·r, in]: A_e its rows e·r … (e+1)·r      B [out, r·E]: B_e its columns e, e + E, …

One wrapper adapts one parameter; those of one module lie around each other, in the order of the parameters, as in PEFT.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ferrolora.adapters.base import WeightSource, adapter_dtype, sixteen_bit
from ferrolora.adapters.config import PeftConfig
from ferrolora.adapters.init import initializer
from ferrolora.adapters.init.start import Start
from ferrolora.adapters.lora_config import LoraConfig
from ferrolora.adapters.lora_layer import LoraLayer
from ferrolora.adapters.rows import RowGroups
from ferrolora.errors import UnsupportedError
from ferrolora.nn.experts import PROJECTIONS, experts_forward
from ferrolora.ops.linear import LowRank


class LoraExperts(LoraLayer):
    """Adapters on one `[E, out, in]` parameter of fused experts, float or packed.

    Each routed expert computes base and branch in one product over its tokens; no `[E, out, in]` delta exists but
    while merging.

    Args:
        base_layer: the experts, or the wrapper of another of their parameters.
        parameter_name: "gate_up_proj" or "down_proj".
    """

    containers = ("lora_A", "lora_B")

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__(base_layer)
        self.parameter_name = parameter_name
        shapes = getattr(self.experts, "shapes", None) or {parameter_name: self.weight.shape}
        self.num_experts, self.out_features, self.in_features = shapes[parameter_name]
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    @property
    def experts(self) -> nn.Module:
        """The module with the experts, inside of all wrappers."""
        inner = self.base_layer
        return inner.experts if isinstance(inner, LoraExperts) else inner

    @property
    def weight(self) -> Tensor:
        """The parameter that is adapted; of packed experts their codes."""
        return self.experts.get_parameter(self.parameter_name)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The float type that the experts stand for."""
        return cast(torch.dtype, getattr(self.experts, "compute_dtype", self.weight.dtype))

    def place(self, field: str) -> tuple[nn.Module, str]:
        return self.experts, self.parameter_name

    def chain(self) -> "dict[str, LoraExperts]":
        """The wrappers from here inwards, by the parameter that each adapts."""
        inner = self.base_layer.chain() if isinstance(self.base_layer, LoraExperts) else {}
        return {self.parameter_name: self, **inner}

    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        lora = self.configure(name, config, path)
        rank = self.r[name] * self.num_experts
        a = nn.Linear(self.in_features, rank, bias=False)
        b = nn.Linear(rank, self.out_features, bias=False)
        self._start_experts(name, lora, a.weight, b.weight)
        dtype = adapter_dtype(self, autocast_dtype)
        self.lora_A[name] = a.to(self.weight.device, dtype)
        self.lora_B[name] = b.to(self.weight.device, dtype)

    @torch.no_grad()
    def _start_experts(self, name: str, config: LoraConfig, a: Tensor, b: Tensor) -> None:
        fill, scaling = initializer(config.init_lora_weights), self.scaling[name]
        for one_a, one_b in zip(self._each_a(a), self._each_b(b), strict=True):
            fill(Start(one_a, one_b, scaling, config.init_lora_weights, self.float_weight, self._unquantized))

    def _unquantized(self, weight: Tensor) -> Tensor:
        return weight

    def _each_a(self, a: Tensor) -> Sequence[Tensor]:
        """A `[E·r, in]` as E views `[r, in]`."""
        return a.view(self.num_experts, -1, self.in_features).unbind(0)

    def _each_b(self, b: Tensor) -> Sequence[Tensor]:
        """B `[out, r·E]` as E views `[out, r]`."""
        return b.view(self.out_features, -1, self.num_experts).unbind(2)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.entry("lora_A", name).weight, self.entry("lora_B", name).weight

    def branches(self, names: Sequence[str]) -> list[LowRank]:
        """The adapters `names` as one branch an expert; of several, the scaling goes into B."""
        pairs = [tuple(map(list, self._each(name))) for name in names]
        if len(names) == 1:
            return [LowRank(a, b, self.scaling[names[0]]) for a, b in zip(*pairs[0], strict=True)]
        stacked = []
        for expert in range(self.num_experts):
            a = torch.cat([pair[0][expert] for pair in pairs])
            b = [pair[1][expert] * self.scaling[name] for pair, name in zip(pairs, names, strict=True)]
            stacked.append(LowRank(a, torch.cat(b, dim=1), 1.0))
        return stacked

    def _each(self, name: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        a, b = self.factors(name)
        return self._each_a(a), self._each_b(b)

    def forward(  # type: ignore[override]  # experts take a routing beside x
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        branches: Mapping[str, Sequence[LowRank]] | None = None,
    ) -> Tensor:
        """The experts' output with the adapters of this parameter, and with `branches` of those further out."""
        if self.row_groups is not None:
            self.forward_rows(hidden_states, self.row_groups)
        names = self._counting()
        branches = {**(branches or {}), **({self.parameter_name: self.branches(names)} if names else {})}
        if isinstance(self.base_layer, LoraExperts):
            return self.base_layer(hidden_states, top_k_index, top_k_weights, branches)  # type: ignore[no-any-return]
        if not branches:
            return self.base_layer(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        return experts_forward(self.base_layer, hidden_states, top_k_index, top_k_weights, branches)

    def _counting(self) -> list[str]:
        """The adapters that count in a forward pass."""
        if not self.adapters_enabled or (self.merged and not self._beside):
            return []
        return self.merged_adapters or [name for name in self.active_adapters if name in self.lora_A]

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        raise UnsupportedError("experts are called with a routing, not with x alone")

    def forward_rows(self, x: Tensor, groups: RowGroups) -> Tensor:
        raise UnsupportedError(
            f"adapter_names: tokens of different rows meet in the experts ({self.parameter_name}), so a batch with "
            "target_parameters cannot mix adapters; run the rows apart"
        )

    # -- merging ---------------------------------------------------------------------------------------------------

    def float_weight(self) -> Tensor:
        if self.writable:
            return super().float_weight()
        return cast(Tensor, cast(Any, self.experts).dequantize(self.parameter_name, torch.float32))

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        return torch.stack([self._delta(a, b, name) for a, b in zip(*self._each(name), strict=True)])

    def _delta(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        wide = torch.promote_types(a.dtype, torch.float32)
        return (b.to(wide) @ a.to(wide)) * self.scaling[name]

    def weight_with(self, names: Sequence[str], weight: Tensor) -> Tensor:
        total = weight.clone()
        for name in names:
            for expert, (a, b) in enumerate(zip(*self._each(name), strict=True)):
                total[expert] += self._delta(a.detach(), b.detach(), name)
        return total

    @torch.no_grad()
    def merged_module(self, names: Sequence[str], dtype: torch.dtype | None) -> nn.Module:
        """The float experts with the adapters `names` of this parameter and of those further in, rounded once."""
        experts, chain = cast(Any, self.experts), self.chain()
        target = dtype or (None if self.writable else sixteen_bit(experts))
        weights: dict[str, Tensor] = {}
        for projection in PROJECTIONS:
            wrapper = chain.get(projection)
            if wrapper is not None:
                present = [name for name in names if name in wrapper.adapter_names()]
                merged = wrapper.weight_with(present, wrapper.float_weight())
                weights[projection] = merged.to(target or wrapper.weight.dtype)
            elif not self.writable:
                weights[projection] = experts.dequantize(projection, target)
        if not self.writable:
            return cast(nn.Module, experts.with_float(weights))
        for projection, weight in weights.items():
            old = self.experts.get_parameter(projection)
            self.experts.register_parameter(projection, nn.Parameter(weight, old.requires_grad))
        return self.experts


def wrap_parameters(module: nn.Module, names: Sequence[str], path: str) -> dict[str, LoraExperts]:
    """Puts one wrapper a parameter around fused experts, or finds those that are there.

    Args:
        module: float or packed experts, or the outermost of their wrappers.
        names: the parameters, all of `PROJECTIONS`.
        path: of the module.

    Returns: {parameter: wrapper}; the last is the outermost.

    Raises:
        UnsupportedError: there are wrappers already, of other parameters: the place of a tensor in a file is its
            wrapper's depth, so all adapters of a model must have the same.
    """
    if isinstance(module, LoraExperts):
        there = dict(reversed(module.chain().items()))
        if list(there) != list(names):
            raise UnsupportedError(
                f"{path} has adapters on {list(there)}; another adapter must have the same target_parameters, "
                f"not {list(names)}"
            )
        return there
    wrappers: dict[str, LoraExperts] = {}
    inner: Any = module
    for name in names:
        inner = wrappers[name] = LoraExperts(inner, name)
    return wrappers
