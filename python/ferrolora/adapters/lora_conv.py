"""LoRA on a convolution: A convolves to r channels, B mixes them pointwise."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ferrolora.adapters.base import WeightSource, adapter_dtype
from ferrolora.adapters.config import PeftConfig
from ferrolora.adapters.lora_layer import LoraLayer
from ferrolora.errors import TargetError, UnsupportedError


class LoraConv(LoraLayer):
    """y = conv(x) + Σ s·B(A(drop(x))): A [r, in, k…] with the base's stride and padding, B [out, r, 1…].

    As PEFT has it, A covers all input channels and is not dilated; with groups the rank is split among them by B.
    """

    containers = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape)

    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        lora = self.configure(name, config, path)
        base: Any = self.base_layer
        if self.r[name] % base.groups:
            raise TargetError(f"{path} has {base.groups} groups; its rank {self.r[name]} must be a multiple of that")
        if base.groups > 1 and (lora.use_dora or lora.init_lora_weights not in (True, False, "gaussian")):
            raise UnsupportedError(f"{path}: a convolution with {base.groups} groups takes plain LoRA only")
        kind = type(base)
        a = kind(base.in_channels, self.r[name], base.kernel_size, base.stride, base.padding, bias=False)
        b = kind(self.r[name], base.out_channels, 1, groups=base.groups, bias=lora.lora_bias)
        if lora.init_lora_weights is not False:
            self.start(name, lora, a.weight.detach().flatten(1), b.weight.detach().flatten(1), source)
            if lora.lora_bias:
                nn.init.zeros_(b.bias)
        dtype = adapter_dtype(base, autocast_dtype)
        self.lora_A[name] = a.to(self.weight.device, dtype)
        self.lora_B[name] = b.to(self.weight.device, dtype)
        self.start_dora(name, lora, autocast_dtype)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.entry("lora_A", name).weight.flatten(1), self.entry("lora_B", name).weight.flatten(1)

    def magnitude_shape(self, out: int) -> tuple[int, ...]:
        return (1, out, *[1] * (self.weight.dim() - 2))

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """x [batch, in, …] → [batch, out, …] in the type of the base's own output."""
        base: Tensor = self.base_layer(x)
        y = base
        for name in names:
            a, b = self.entry("lora_A", name), self.entry("lora_B", name)
            dropped = F.dropout(x.to(a.weight.dtype), self.lora_dropout[name], self.training)
            branch = b(a(dropped)) * self.scaling[name]
            if self.uses_dora(name):
                branch = self._dora(base + branch, name) - base
            y = y + branch
        return y.to(base.dtype)

    def weight_with(self, names: Sequence[str], weight: Tensor) -> Tensor:
        base: Any = self.base_layer
        if base.groups > 1:
            raise UnsupportedError(
                f"a convolution with {base.groups} groups cannot take in LoRA: its delta crosses groups"
            )
        if any(size != 1 for size in base.dilation):
            raise UnsupportedError("a dilated convolution cannot take in LoRA: A is not dilated (as in PEFT)")
        return super().weight_with(names, weight)

    def bias_with(self, names: Sequence[str], bias: Tensor | None) -> Tensor | None:
        for name in names:
            own: Tensor | None = self.entry("lora_B", name).bias
            if own is None:
                continue
            if bias is None:
                raise UnsupportedError("lora_bias=True cannot be merged into a convolution without a bias")
            bias = bias + own.detach() * self.scaling[name]
        return bias

    def _dora(self, y: Tensor, name: str) -> Tensor:
        shape = self.magnitude_shape(self.weight.shape[0])
        scale = self.dora_scale(name).view(shape)
        if self.bias is None:
            return y * scale
        bias = self.bias.view(shape)
        return (y - bias) * scale + bias
