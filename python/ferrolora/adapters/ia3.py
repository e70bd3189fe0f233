"""(IA)³: learned vectors that rescale keys, values and the inputs of feed-forward layers."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ferrolora.adapters.base import AdapterLayer, WeightSource, adapter_dtype
from ferrolora.adapters.config import ModuleConfig, PeftConfig, PeftType
from ferrolora.adapters.lora import is_transposed_linear, linear_features, refuse_uncalled
from ferrolora.errors import TargetError, UnsupportedError


@dataclass
class IA3Config(ModuleConfig):
    """y = (W·x + b)⊙l, or in a feed-forward module y = W·(x⊙l) + b; l starts at one.

    Args:
        target_modules: as in `LoraConfig`. Default None: keys, values and the second feed-forward layer, by a table of
            model families.
        feedforward_modules: those of the targets whose input is rescaled: a list of names or a regular expression.
            Default None: by the same table when `target_modules` is None, else none.
        exclude_modules: as in `LoraConfig`.
        modules_to_save: as in `LoraConfig`.
        fan_in_fan_out: kept for PEFT's file; the module itself tells.
        init_ia3_weights: False draws l from N(0, 1). Default True: ones.

    Raises:
        UnsupportedError: a feed-forward name that is not a target.

    Source: T-Few, arXiv 2205.05638.
    """

    feedforward_modules: Sequence[str] | str | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.IA3
        if isinstance(self.feedforward_modules, list) and isinstance(self.target_modules, list):
            strange = sorted(set(self.feedforward_modules) - set(self.target_modules))
            if strange:
                raise UnsupportedError(f"IA3Config: feedforward_modules {strange} are not in target_modules")


def wrap(module: nn.Module, path: str, config: PeftConfig | None = None) -> AdapterLayer:
    """Puts the IA3 wrapper around `module`. Raises TargetError for a type that IA3 is not implemented for."""
    refuse_uncalled(module, path)
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or is_transposed_linear(module):
        return IA3Layer(module)
    raise TargetError(f"{path} is a {type(module).__name__}; IA3 adapts nn.Linear, Conv1D and nn.Conv1d/2d/3d")


class IA3Layer(AdapterLayer):
    """y = base(x ⊙ Π l_feedforward) ⊙ Π l over the adapters."""

    containers = ("ia3_l",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.transposed = is_transposed_linear(base_layer)
        self.ia3_l = nn.ParameterDict()
        self.is_feedforward: dict[str, bool] = {}

    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        self.check_new(name, path)
        if not isinstance(config, IA3Config):
            raise UnsupportedError(f"{path} has IA3 adapters; {config.peft_type} cannot be added to it")
        feedforward = is_named(config.feedforward_modules, path)
        base: Any = self.base_layer
        if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            channels = base.in_channels if feedforward else base.out_channels
            shape = (1, channels, *[1] * (self.weight.dim() - 2))
        else:
            into, out = linear_features(base)
            shape = (1, into) if feedforward else (out, 1)
        values = torch.ones(shape) if config.init_ia3_weights else torch.randn(shape)
        dtype = adapter_dtype(base, autocast_dtype)
        self.ia3_l[name] = nn.Parameter(values.to(self.weight.device, dtype))
        self.is_feedforward[name] = feedforward

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self.is_feedforward.pop(name, None)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """x of the base's input shape → the base's output shape and type."""
        into, out = self._factors(names)
        y: Tensor = self.base_layer(x if into is None else (x * self._spread(into)).to(x.dtype))
        return y if out is None else (y * self._spread(out)).to(y.dtype)

    def weight_with(self, names: Sequence[str], weight: Tensor) -> Tensor:
        into, out = self._factors(names)
        inputs, outputs = ((-1, 1), (1, -1)) if self.transposed else ((1, -1), (-1, 1))
        tail = [1] * (weight.dim() - 2)
        scaled = weight.clone()
        if into is not None:
            scaled = scaled * into.detach().view(*inputs, *tail)
        return scaled if out is None else scaled * out.detach().view(*outputs, *tail)

    def bias_with(self, names: Sequence[str], bias: Tensor | None) -> Tensor | None:
        out = self._factors(names)[1]
        return bias if bias is None or out is None else bias * out.detach()

    def _factors(self, names: Sequence[str]) -> tuple[Tensor | None, Tensor | None]:
        """The products of the vectors on the input and on the output, flat; None for an empty product."""
        vectors = {name: self.entry("ia3_l", name).flatten() for name in names}
        into = [vectors[name] for name in names if self.is_feedforward[name]]
        out = [vectors[name] for name in names if not self.is_feedforward[name]]
        return (math.prod(into[1:], start=into[0]) if into else None), (
            math.prod(out[1:], start=out[0]) if out else None
        )

    def _spread(self, vector: Tensor) -> Tensor:
        """A vector of channels so that it multiplies inputs and outputs of the base."""
        if isinstance(self.base_layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return vector.view(-1, *[1] * (self.weight.dim() - 2))
        return vector


def is_named(names: Sequence[str] | str | None, path: str) -> bool:
    """Whether a regular expression matches the whole path, or a list holds it or a `.suffix` of it."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)
