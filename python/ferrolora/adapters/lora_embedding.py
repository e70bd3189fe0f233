"""LoRA on an embedding: the low-rank matrix is looked up, not multiplied."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferrolora.adapters.base import WeightSource, adapter_dtype
from ferrolora.adapters.config import PeftConfig
from ferrolora.adapters.lora_layer import LoraLayer
from ferrolora.errors import UnsupportedError


class LoraEmbedding(LoraLayer):
    """y = W[ids] + Σ s·Aᵀ[ids]·Bᵀ over the adapters, with A [r, vocabulary] and B [dim, r].

    A starts at zero and B at N(0, 1): the part that is looked up is the one that starts at zero. With DoRA y is
    scaled by m/n, one value for each of the `dim` outputs.
    """

    containers = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T  # [dim, vocabulary]

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        lora = self.configure(name, config, path)
        if lora.lora_bias:
            raise UnsupportedError(f"{path}: lora_bias=True is not possible on an embedding")
        vocabulary, dim = self.weight.shape
        a, b = torch.randn(self.r[name], vocabulary), torch.randn(dim, self.r[name])
        if lora.init_lora_weights is True:
            a.zero_()
        elif lora.init_lora_weights is not False:
            self.start(name, lora, a, b, source)
        device, dtype = self.weight.device, adapter_dtype(self.base_layer, autocast_dtype)
        self.lora_embedding_A[name] = nn.Parameter(a.to(device, dtype))
        self.lora_embedding_B[name] = nn.Parameter(b.to(device, dtype))
        self.start_dora(name, lora, autocast_dtype)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.entry("lora_embedding_A", name), self.entry("lora_embedding_B", name)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """ids [...] → [..., dim] in the type of the base's own output."""
        base: Tensor = self.base_layer(x)
        y = base
        embedding: Any = self.base_layer
        embed_scale = getattr(embedding, "embed_scale", None)  # the output of the base is already multiplied by it
        for name in names:
            a, b = self.factors(name)
            delta = (F.embedding(x, a.T, embedding.padding_idx) @ b.T) * self.scaling[name]
            if embed_scale is not None:
                delta = delta * embed_scale
            if self.uses_dora(name):
                delta = self.dora_scale(name) * (base + delta) - base
            y = y + delta
        return y.to(base.dtype)
