"""Methods whose delta on a linear layer is scaling·B·A, however they come by A and B."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ferrolora.adapters.base import AdapterLayer
from ferrolora.adapters.lora import is_transposed_linear, linear_features
from ferrolora.adapters.lora_layer import LowRankBase
from ferrolora.ops.linear import LowRank


class LowRankLinear(AdapterLayer):
    """y = base(x) + Σ scaling·B(A(drop(x))) over the adapters; one alone over a packed base is one fused call."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.transposed = is_transposed_linear(base_layer)
        self.in_features, self.out_features = linear_features(base_layer)
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}

    @abstractmethod
    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]) that a forward pass uses now."""

    def merged_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]) that a merge writes. Default: `factors`."""
        return self.factors(name)

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self.scaling.pop(name, None)
        self.lora_dropout.pop(name, None)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """x [..., in] → [..., out] in the type of the base's own output."""
        if len(names) == 1 and hasattr(self.base_layer, "forward_with_low_rank"):
            dropout = self.lora_dropout[names[0]] if self.training else 0.0
            low_rank = LowRank(*self.factors(names[0]), self.scaling[names[0]], dropout)
            return cast(LowRankBase, self.base_layer).forward_with_low_rank(x, low_rank)
        base: Tensor = self.base_layer(x)
        y = base
        for name in names:
            a, b = self.factors(name)
            dropped = F.dropout(x.to(a.dtype), self.lora_dropout[name], self.training)
            y = y + F.linear(F.linear(dropped, a), b) * self.scaling[name]
        return y.to(base.dtype)

    def weight_with(self, names: Sequence[str], weight: Tensor) -> Tensor:
        total = weight.clone()
        for name in names:
            a, b = (factor.detach() for factor in self.merged_factors(name))
            delta = (b @ a) * self.scaling[name]
            total += delta.T if self.transposed else delta
        return total
