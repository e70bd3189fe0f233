"""What LoRA on any module shares: rank, scaling, start and DoRA's magnitude of each adapter."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ferrolora.adapters.base import AdapterLayer, WeightSource, adapter_dtype
from ferrolora.adapters.config import PeftConfig, pattern_value
from ferrolora.adapters.dora import RowNorms
from ferrolora.adapters.init import initializer
from ferrolora.adapters.init.start import Start
from ferrolora.adapters.lora_config import LoraConfig
from ferrolora.errors import UnsupportedError
from ferrolora.ops.dequantize import dequantize
from ferrolora.ops.linear import LowRank
from ferrolora.ops.quantize import quantize
from ferrolora.spec import QuantSpec


class LowRankBase(Protocol):
    """A linear layer that computes base and low-rank branch in one call."""

    def forward_with_low_rank(self, x: Tensor, lora: LowRank) -> Tensor:
        """base(x) + scaling·B(A(drop(x))): x [..., in] → [..., out]."""


class LoraLayer(AdapterLayer):
    """The parts of LoRA that do not depend on the kind of module.

    A subclass sees its weight as a matrix [out, in]: `matrix` and `from_matrix` convert its own layout to it and back.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_magnitude_vector = nn.ParameterDict()
        self._norms = RowNorms()

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight of this module as [out, in]."""
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A matrix [out, in] in the layout of this module's weight."""
        return matrix

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A [r, in], B [out, r]) of an adapter."""
        raise NotImplementedError

    def uses_dora(self, name: str) -> bool:
        """Whether adapter `name` has a magnitude vector."""
        return name in self.lora_magnitude_vector

    def configure(self, name: str, config: PeftConfig, path: str) -> LoraConfig:
        """Checks that adapter `name` can be added, and notes its rank, scaling and dropout."""
        self.check_new(name, path)
        if not isinstance(config, LoraConfig):
            raise UnsupportedError(f"{path} has LoRA adapters; {config.peft_type} cannot be added to it")
        self.rescale(name, config, path)
        return config

    def rescale(self, name: str, config: LoraConfig, path: str) -> None:
        """Notes rank, alpha, scaling and dropout of adapter `name` as `config` has them for the module at `path`."""
        r = pattern_value(config.rank_pattern, path, config.r)
        alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
        self.r[name], self.lora_alpha[name], self.lora_dropout[name] = r, alpha, config.lora_dropout
        self.scaling[name] = alpha / math.sqrt(r) if config.use_rslora else alpha / r

    def grow(self, name: str, rank: int) -> None:
        """Replaces A and B of adapter `name` by zeros of a larger rank; the modules that hold them stay."""
        for container, shape in zip(self.containers, ((rank, -1), (-1, rank)), strict=False):
            entry = self.entries(container)[name]
            old = entry if isinstance(entry, nn.Parameter) else entry.weight
            size = [old.shape[dim] if length < 0 else length for dim, length in enumerate(shape)] + [*old.shape[2:]]
            new = nn.Parameter(torch.zeros(size, dtype=old.dtype, device=old.device), old.requires_grad)
            if isinstance(entry, nn.Parameter):
                self.entries(container)[name] = new
            else:
                entry.weight = new

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        for values in (self.r, self.lora_alpha, self.lora_dropout, self.scaling):
            values.pop(name, None)
        self._norms.forget(name)

    @torch.no_grad()
    def start(self, name: str, config: LoraConfig, a: Tensor, b: Tensor, source: WeightSource | None) -> None:
        """Fills A and B (two-dimensional views) with the configured initializer, which may change the base weight."""

        def weight() -> Tensor:
            return self.matrix(source().float() if source is not None and not self.writable else self.float_weight())

        options = config.loftq_config or {}
        quantizer = self._quantizer(int(options.get("loftq_bits", 4)))
        name_of_start = config.init_lora_weights
        start = Start(a, b, self.scaling[name], name_of_start, weight, quantizer, not self.writable, options)
        changed = initializer(config.init_lora_weights)(start)
        if changed is not None:
            self.set_base_weight(self.from_matrix(changed))

    def _quantizer(self, bits: int) -> Callable[[Tensor], Tensor]:
        """What a float weight [out, in] becomes when this base stores it; over a float base, in NF4 or int8."""

        def through_base(weight: Tensor) -> Tensor:
            return cast(Tensor, cast(Any, self.base_layer).with_weight(weight).dequantize(torch.float32))

        def through_codec(weight: Tensor) -> Tensor:
            spec = {4: QuantSpec("nf4"), 8: QuantSpec("int8")}.get(bits)
            if spec is None:
                raise UnsupportedError(f"LoraConfig: loftq_bits must be 4 or 8, not {bits}")
            return dequantize(quantize(weight.contiguous(), spec), dtype=torch.float32)

        return through_codec if self.writable else through_base

    def set_base_weight(self, weight: Tensor) -> None:
        """Gives the base another weight, quantized as it was before if it is packed."""
        if self.writable:
            self.weight.data = weight.to(self.weight.dtype)
        else:
            self.base_layer = cast(Any, self.base_layer).with_weight(weight)

    def start_dora(self, name: str, config: LoraConfig, autocast_dtype: bool) -> None:
        """Gives adapter `name` its magnitude m = ‖W + sBA‖ of each output row, if the configuration asks for DoRA."""
        if config.use_dora:
            dtype = adapter_dtype(self.base_layer, autocast_dtype)
            norms = self.row_norms(name).to(dtype)
            self.lora_magnitude_vector[name] = nn.Parameter(norms.view(self.magnitude_shape(len(norms))))

    def magnitude_shape(self, out: int) -> tuple[int, ...]:
        """The shape of DoRA's magnitude in a file."""
        return (out,)

    def row_norms(self, name: str) -> Tensor:
        """‖W + sBA‖ of each output row, [out], float32 or wider, without a gradient."""
        a, b = self.factors(name)
        use_cache = not self.training and not self._beside
        return self._norms(self, name, a.detach(), b.detach(), self.scaling[name], use_cache)

    def dora_scale(self, name: str) -> Tensor:
        """m/‖W + sBA‖ of each output row, [out]; only m has a gradient."""
        magnitude: Tensor = self.entry("lora_magnitude_vector", name)
        return magnitude.flatten() / self.row_norms(name).to(magnitude.dtype)

    def product_with_weight(self, a: Tensor) -> Tensor:
        """W·Aᵀ [out, r] in float32 or wider, for A [r, in]. A packed base is called, not decoded."""
        if not self.writable:
            y = cast(Tensor, self.base_layer(a))
            return (y if self.bias is None else y - self.bias).T
        weight = self.matrix(self.weight.detach())
        wide = torch.promote_types(weight.dtype, a.dtype)
        return torch.cat([rows.to(wide) @ a.to(wide).T for rows in torch.split(weight, 4096)])

    @torch.no_grad()
    def delta_weight(self, name: str) -> Tensor:
        """What adapter `name` adds to the base weight, in the weight's own layout, float32 or wider."""
        if self.uses_dora(name):
            return self.from_matrix(self._dora_delta(name, self.matrix(self.float_weight())))
        return self.from_matrix(self._low_rank_delta(name))

    def weight_with(self, names: Sequence[str], weight: Tensor) -> Tensor:
        matrix = self.matrix(weight)
        total = matrix.clone()
        for name in names:
            total += self._dora_delta(name, matrix) if self.uses_dora(name) else self._low_rank_delta(name)
        return self.from_matrix(total)

    def _low_rank_delta(self, name: str) -> Tensor:
        a, b = (factor.detach() for factor in self.factors(name))
        dtype = torch.promote_types(a.dtype, torch.float32)
        return (b.to(dtype) @ a.to(dtype)) * self.scaling[name]

    def _dora_delta(self, name: str, matrix: Tensor) -> Tensor:
        scale = self.dora_scale(name).detach()[:, None]
        return scale * (matrix + self._low_rank_delta(name)) - matrix
