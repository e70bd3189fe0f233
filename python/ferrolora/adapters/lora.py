"""LoRA: a low-rank matrix beside a linear layer."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ferrolora.adapters.base import AdapterLayer, WeightSource, adapter_dtype
from ferrolora.adapters.config import PeftConfig
from ferrolora.adapters.lora_config import LoraConfig as LoraConfig
from ferrolora.adapters.lora_conv import LoraConv
from ferrolora.adapters.lora_embedding import LoraEmbedding
from ferrolora.adapters.lora_layer import LoraLayer, LowRankBase
from ferrolora.adapters.rows import RowGroups
from ferrolora.adapters.siblings import InputGroup
from ferrolora.errors import TargetError, UnsupportedError
from ferrolora.ops.linear import LowRank


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether `module` is GPT-2's Conv1D: y = x·W + b with W [in, out] (`nx` in, `nf` out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nx") and hasattr(module, "nf")


def wrap(module: nn.Module, path: str, config: PeftConfig | None = None) -> AdapterLayer:
    """Puts the LoRA wrapper that fits around `module`.

    Raises:
        TargetError: the module, at `path` in the model, is of a type that LoRA is not implemented for.
        UnsupportedError: the module is never called, so an adapter on it would do nothing.
    """
    refuse_uncalled(module, path)
    if isinstance(module, nn.Linear) or is_transposed_linear(module):
        return LoraLinear(module)
    if isinstance(module, nn.Embedding):
        return LoraEmbedding(module)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return LoraConv(module)
    raise TargetError(
        f"{path} is a {type(module).__name__}; LoRA adapts nn.Linear, Conv1D, nn.Embedding and nn.Conv1d/2d/3d. "
        "Narrow target_modules, or name it in exclude_modules"
    )


def refuse_uncalled(module: nn.Module, path: str) -> None:
    """Raises UnsupportedError for a module whose weight is read by others instead of its being called."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise UnsupportedError(f"{path}: nn.MultiheadAttention reads the weight of out_proj without calling it")


def linear_features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of an nn.Linear or a Conv1D."""
    source: Any = module
    return (source.nx, source.nf) if is_transposed_linear(module) else (source.in_features, source.out_features)


class LoraLinear(LoraLayer):
    """y = base(x) + Σ s·B(A(drop(x))) over the adapters; with DoRA (m/n)·(that, without the bias) + bias.

    Adapters over a base that offers `forward_with_low_rank` are one fused call: several are stacked into one of
    rank Σ r, unless their dropout makes their inputs differ.
    """

    containers = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.transposed = is_transposed_linear(base_layer)
        self.in_features, self.out_features = linear_features(base_layer)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.shared_input: InputGroup | None = None

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.transposed else matrix

    def add_adapter(
        self, name: str, config: PeftConfig, path: str, autocast_dtype: bool, source: WeightSource | None = None
    ) -> None:
        lora = self.configure(name, config, path)
        a = nn.Linear(self.in_features, self.r[name], bias=False)
        b = nn.Linear(self.r[name], self.out_features, bias=lora.lora_bias)
        self.start(name, lora, a.weight, b.weight, source)
        if lora.lora_bias and lora.init_lora_weights is not False:
            nn.init.zeros_(b.bias)
        dtype = adapter_dtype(self.base_layer, autocast_dtype)
        self.lora_A[name] = a.to(self.weight.device, dtype)
        self.lora_B[name] = b.to(self.weight.device, dtype)
        self.start_dora(name, lora, autocast_dtype)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.entry("lora_A", name).weight, self.entry("lora_B", name).weight

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """x [..., in] → [..., out] in the type of the base's own output."""
        plain = [name for name in names if not self.uses_dora(name)]
        stackable = len(names) == 1 or (len(plain) == len(names) and self._same_input(names))
        if stackable and hasattr(self.base_layer, "forward_with_low_rank"):
            y = self._fused(x, self._low_rank(names))
            y = self._with_biases(y, plain)
            return y if plain else self._dora(y, names[0])
        base: Tensor = self.base_layer(x)
        y = base
        for name in names:
            branch = self._branch(x, name)
            y = y + branch if name in plain else y + (self._dora(base + branch, name) - base)
        return y.to(base.dtype)

    def forward_rows(self, x: Tensor, groups: RowGroups) -> Tensor:
        names = [name for name in groups.groups if name in self.lora_A]
        if any(map(self.uses_dora, names)):
            return super().forward_rows(x, groups)
        if names and hasattr(self.base_layer, "forward_with_low_rank") and self._one_dropout(names):
            y = cast(LowRankBase, self.base_layer).forward_with_low_rank(x, self._of_rows(names, x, groups))
            return self._with_biases_of_rows(y, names, groups)
        base: Tensor = self.base_layer(x)  # once for all rows
        y = base
        for name in names:
            rows = groups.rows(name, x)
            y = y.index_add(0, rows, self._branch(x[rows], name).to(y.dtype))
        return y

    def bias_with(self, names: Sequence[str], bias: Tensor | None) -> Tensor | None:
        deltas = [delta for delta in map(self.delta_bias, names) if delta is not None]
        if not deltas:
            return bias
        if bias is None:
            kind = type(self.base_layer).__name__
            raise UnsupportedError(f"lora_bias=True cannot be merged into a {kind} without a bias")
        return bias + torch.stack(deltas).sum(0)

    def delta_bias(self, name: str) -> Tensor | None:
        """What adapter `name` adds to the base bias, or None."""
        bias: Tensor | None = self.entry("lora_B", name).bias
        return None if bias is None else bias.detach() * self.scaling[name]

    def _branch(self, x: Tensor, name: str) -> Tensor:
        a, b = self.entry("lora_A", name), self.entry("lora_B", name)
        dropped = F.dropout(x.to(a.weight.dtype), self.lora_dropout[name], self.training)
        branch: Tensor = b(a(dropped)) * self.scaling[name]
        return branch

    def fused_operand(self) -> LowRank | None:
        """The branch that a call would now hand to the base in one fused call; None if it would do anything else."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.row_groups is not None or self.merged or not self.adapters_enabled:
            return None
        return self._low_rank(names)

    def _fused(self, x: Tensor, lora: LowRank) -> Tensor:
        if self.shared_input is not None:
            return self.shared_input.forward(self, x, lora)
        return cast(LowRankBase, self.base_layer).forward_with_low_rank(x, lora)

    def _same_input(self, names: Sequence[str]) -> bool:
        return not self.training or not any(self.lora_dropout[name] for name in names)

    def _low_rank(self, names: Sequence[str]) -> LowRank:
        """The adapters as one; the scaling of several goes into B."""
        if len(names) == 1:
            a, b = self.factors(names[0])
            dropout = self.lora_dropout[names[0]] if self.training else 0.0
            return LowRank(a, b, self.scaling[names[0]], dropout)
        return self._stacked(names)

    def _stacked(self, names: Sequence[str]) -> LowRank:
        pairs = [self.factors(name) for name in names]
        stacked_b = [b * self.scaling[name] for name, (_, b) in zip(names, pairs, strict=True)]
        return LowRank(torch.cat([a for a, _ in pairs]), torch.cat(stacked_b, dim=1), 1.0, 0.0)

    def _one_dropout(self, names: Sequence[str]) -> bool:
        return not self.training or len({self.lora_dropout[name] for name in names}) == 1

    def _of_rows(self, names: Sequence[str], x: Tensor, groups: RowGroups) -> LowRank:
        """The adapters stacked, each row of the batch using the ranks of its own."""
        groups.rows_each(x)
        if id(self) in groups.stacked:
            return groups.stacked[id(self)]
        ends = list(accumulate(self.r[name] for name in names))
        spans = {name: (end - self.r[name], end) for name, end in zip(names, ends, strict=True)}
        dropout = self.lora_dropout[names[0]] if self.training else 0.0
        row_ranks = tuple(spans.get(name, (0, 0)) for name in groups.names)
        branch = self._stacked(names)._replace(dropout_p=dropout, row_ranks=row_ranks)
        if not self.training and not torch.is_grad_enabled():
            groups.stacked[id(self)] = branch
        return branch

    def _with_biases_of_rows(self, y: Tensor, names: Sequence[str], groups: RowGroups) -> Tensor:
        for name in names:
            bias = self.entry("lora_B", name).bias
            if bias is not None:
                rows = groups.rows(name, y)
                y = y.index_add(0, rows, (bias * self.scaling[name]).to(y.dtype).expand(y[rows].shape))
        return y

    def _with_biases(self, y: Tensor, names: Sequence[str]) -> Tensor:
        for name in names:
            bias = self.entry("lora_B", name).bias
            if bias is not None:
                y = (y + bias * self.scaling[name]).to(y.dtype)
        return y

    def _dora(self, y: Tensor, name: str) -> Tensor:
        """(m/n)·y of an output that holds base and branch, leaving the base's bias alone."""
        scale = self.dora_scale(name)
        scaled = y * scale if self.bias is None else (y - self.bias) * scale + self.bias
        return scaled.to(y.dtype)
