"""`QuantExperts`: the fused experts of a mixture-of-experts layer with their matrices in 4 or 8 bits.

    y[t] = Σ_j w[t, j] · down[e]·gate(gate_up[e]·x[t]),    e = index[t, j]

Tokens are sorted by expert, and each routed expert makes one fused packed product over its rows: an expert that no
token goes to is neither decoded nor read.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ferrolora.errors import FormatError, ShapeError, UnsupportedError
from ferrolora.nn.expert_stack import (
    PARTS,
    QuantStack,
    empty_stack,
    quantize_stack,
    stack_from_state,
    stack_state,
)
from ferrolora.nn.scales import types_kept
from ferrolora.ops.linear import LowRank, linear
from ferrolora.spec import QuantSpec

PROJECTIONS = ("gate_up_proj", "down_proj")  # as transformers names them: [E, 2I, H] and [E, H, I]
Branches = Mapping[str, Sequence[LowRank]]  # projection -> one low-rank branch an expert

_DEFAULT = QuantSpec()
_SCALES = PARTS[1:]
# What transformers' decorator of expert classes notes on a module -> the value that means the layout above.
_LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}


def is_fused_experts(module: nn.Module) -> bool:
    """Whether `module` holds float experts as `[E, N, K]` parameters behind transformers' experts interface."""
    return hasattr(module, "has_bias") and hasattr(module, "is_transposed") and hasattr(module, PROJECTIONS[1])


def check_layout(module: nn.Module, path: str) -> None:
    """Raises UnsupportedError unless fused experts have the layout of Mixtral's: gated, no bias, `[E, out, in]`."""
    odd = {name: found for name, value in _LAYOUT.items() if (found := getattr(module, name, value)) != value}
    shapes = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    if odd or set(shapes) != set(PROJECTIONS) or any(len(shape) != 3 for shape in shapes.values()):
        raise UnsupportedError(
            f"{path} is a {type(module).__name__} with {odd or shapes}; experts must be gated, without biases and "
            f"[E, out, in]: {' and '.join(PROJECTIONS)}. Name it in skip_modules to leave it in float"
        )


class QuantExperts(nn.Module):
    """Frozen quantized experts in the place of a float module: `(hidden_states, top_k_index, top_k_weights) → y`.

    Args:
        experts: the float module, its parameters on any device, meta included; its activation is used, its weights
            are not kept.
        spec: the codec. Default nf4, blocks of 64, double quantization.

    The tensors are not initialised: use `from_experts`, `install` or `load_state_dict`. Codes are frozen parameters
    under the float parameters' names; scales are buffers `<name>_absmax`, …, whose type never follows `.to(dtype)`.

    Raises:
        UnsupportedError: experts with biases, without a gate, or stored transposed.
    """

    def __init__(self, experts: nn.Module, spec: QuantSpec = _DEFAULT) -> None:
        super().__init__()
        check_layout(experts, type(experts).__name__)
        self.spec = spec
        self.shapes = {name: experts.get_parameter(name).shape for name in PROJECTIONS}
        self.compute_dtype = experts.get_parameter(PROJECTIONS[0]).dtype
        # The module without its weights: its activation, and its class when float experts are wanted again. In a
        # tuple, since a module attribute would register it.
        self._float_module = (_emptied(experts),)
        for name in PROJECTIONS:
            weight = experts.get_parameter(name)
            self.install(name, empty_stack(spec, weight.shape, weight.dtype, weight.device))

    @classmethod
    def from_experts(cls, experts: nn.Module, spec: QuantSpec = _DEFAULT, name: str | None = None) -> "QuantExperts":
        """Quantize float experts, each expert's matrix by itself.

        Args:
            experts: weights float32, float16 or bfloat16 `[E, N, K]`.
            spec: the codec. Default nf4, blocks of 64, double quantization.
            name: what an error calls the module. Default None: its class.

        Raises:
            QuantizationError: a weight holds NaN or infinity; names projection and expert.
            UnsupportedError: as for the class.
        """
        check_layout(experts, name or type(experts).__name__)
        packed = cls(_emptied(experts, device="meta"), spec)
        for projection in PROJECTIONS:
            weight = experts.get_parameter(projection)
            packed.install(projection, quantize_stack(weight, spec, f"{name or type(experts).__name__}.{projection}"))
        return packed.train(experts.training)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.shapes[PROJECTIONS[0]][0]

    def install(self, projection: str, stack: QuantStack) -> None:
        """Take the tensors of `stack` `[E, N, K]` as the weights of a projection; shared, not copied."""
        if stack.shape != self.shapes[projection] or stack.spec != self.spec:
            raise ShapeError(
                f"{projection} of these experts is {list(self.shapes[projection])} in {self.spec}, "
                f"not {list(stack.shape)} in {stack.spec}"
            )
        self.register_parameter(projection, nn.Parameter(stack.codes, requires_grad=False))
        for part in _SCALES:
            self.register_buffer(f"{projection}_{part}", getattr(stack, part))

    def stack(self, projection: str) -> QuantStack:
        """The weights of a projection, over the module's own tensors.

        Raises:
            UnsupportedError: something, as PEFT's target_parameters, computes a float weight in their place.
        """
        if hasattr(self, "parametrizations"):
            raise UnsupportedError(
                f"{projection}: packed experts cannot be parametrized, as peft's target_parameters does; "
                "use ferrolora's LoraConfig(target_parameters=…), which reads and writes the same files"
            )
        absmax, nested, offset = (getattr(self, f"{projection}_{part}") for part in _SCALES)
        codes = self.get_parameter(projection).detach()
        return QuantStack(codes, absmax, nested, offset, self.spec, self.shapes[projection], self.compute_dtype)

    def dequantize(self, projection: str, dtype: torch.dtype | None = None) -> Tensor:
        """The float weights `[E, N, K]` of a projection, freshly decoded, in `dtype` (default: `compute_dtype`)."""
        return self.stack(projection).dequantize(dtype)

    def with_float(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """A float module of the class that was quantized, over the given weights `[E, N, K]` by projection."""
        experts = _emptied(self._float_module[0])
        for projection, weight in weights.items():
            experts.register_parameter(projection, nn.Parameter(weight, requires_grad=False))
        return experts.train(self.training)

    def dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The float module with the decoded weights, in `dtype` (default: `compute_dtype`)."""
        return self.with_float({projection: self.dequantize(projection, dtype) for projection in PROJECTIONS})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`hidden_states [T, H]`, `top_k_index [T, k]` in [0, E), `top_k_weights [T, k]` to `[T, H]`, in x's type."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gated: Tensor = cast(Any, self._float_module[0])._apply_gate(gate_up)
        return gated

    def extra_repr(self) -> str:
        return f"{self.shapes}, {self.spec}, compute_dtype={self.compute_dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantExperts":
        names = [f"{projection}_{part}" for projection in PROJECTIONS for part in _SCALES]
        with types_kept(self, names, fn):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        like = torch.empty(1, dtype=self.compute_dtype, device=self.get_parameter(PROJECTIONS[0]).device)
        self.compute_dtype = fn(like).dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for projection in PROJECTIONS:
            for part, tensor in stack_state(self.stack(projection)).items():
                destination[f"{prefix}{projection}_{part}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Check each projection's entries against this module, then copy or, with `assign`, take them."""
        known: set[str] = set()
        for projection in PROJECTIONS:
            wanted = {part: f"{prefix}{projection}_{part}" for part in stack_state(self.stack(projection))}
            known |= set(wanted.values())
            absent = [key for key in wanted.values() if key not in state_dict]
            missing_keys += absent
            if absent:
                continue
            stack = stack_from_state({part: state_dict[key] for part, key in wanted.items()}, prefix + projection)
            if stack.spec != self.spec or stack.shape != self.shapes[projection]:
                raise FormatError(
                    f"{prefix}{projection} was saved as {list(stack.shape)} in {stack.spec}, but the module was "
                    f"built as {list(self.shapes[projection])} in {self.spec}"
                )
            if local_metadata.get("assign_to_params_buffers", False):
                self.compute_dtype = stack.dtype
                self.install(projection, stack)
                continue
            with torch.no_grad():
                for part, tensor in zip(PARTS, _parts(self.stack(projection)), strict=True):
                    if tensor is not None:
                        tensor.copy_(getattr(stack, part))
        if strict:
            unexpected_keys += sorted(key for key in state_dict if key.startswith(prefix) and key not in known)


def experts_forward(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    branches: Branches | None = None,
) -> Tensor:
    """The formula of this module over float or packed experts, with low-rank branches fused into their products.

    Differentiable in hidden_states, top_k_weights, and A and B of the branches.

    Args:
        experts: `QuantExperts`, or a float module of that layout (see `check_layout`).
        hidden_states: `[T, H]`.
        top_k_index: integers in [0, E), `[T, k]`.
        top_k_weights: `[T, k]`.
        branches: for some projections, one `LowRank` an expert. Default None.

    Returns: `[T, H]` in the type of hidden_states; the k weighted terms are summed in float32 or wider.

    Raises:
        ShapeError: an index of E or more.
    """
    tokens, slots = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=_count(experts)).tolist()
    if len(counts) > _count(experts):
        raise ShapeError(f"top_k_index holds {len(counts) - 1}, but there are {_count(experts)} experts")
    branches = branches or {}
    up, down = (_product(experts, name, counts, branches.get(name)) for name in PROJECTIONS)
    y = down(cast(Any, experts)._apply_gate(up(hidden_states[order // slots])))
    weighted = y * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[back].view(tokens, slots, hidden_states.shape[-1]).sum(1).to(hidden_states.dtype)


def _count(experts: nn.Module) -> int:
    return experts.num_experts if isinstance(experts, QuantExperts) else experts.get_parameter(PROJECTIONS[0]).shape[0]


def _product(
    experts: nn.Module, projection: str, counts: Sequence[int], lora: Sequence[LowRank] | None
) -> Callable[[Tensor], Tensor]:
    """Rows sorted by expert, `counts[e]` of them for each, to their products with its matrix: `[S, K]` → `[S, N]`."""
    if isinstance(experts, QuantExperts):
        stack = experts.stack(projection)
        width = stack.shape[1]

        def one(x: Tensor, expert: int) -> Tensor:
            return linear(x, stack.expert(expert), None, None if lora is None else lora[expert])
    else:
        weights = experts.get_parameter(projection).unbind(0)
        width = weights[0].shape[0]

        def one(x: Tensor, expert: int) -> Tensor:
            y = F.linear(x, weights[expert])
            return y if lora is None else y + _branch(x, lora[expert]).to(y.dtype)

    def product(x: Tensor) -> Tensor:
        parts = [one(rows, expert) for expert, rows in enumerate(torch.split(x, list(counts))) if len(rows)]
        return torch.cat(parts) if parts else x.new_empty((0, width))

    return product


def _branch(x: Tensor, lora: LowRank) -> Tensor:
    return F.linear(F.linear(x.to(lora.A.dtype), lora.A), lora.B) * lora.scaling


def _parts(stack: QuantStack) -> list[Tensor | None]:
    return [getattr(stack, part) for part in PARTS]


def _emptied(experts: nn.Module, device: str | None = None) -> nn.Module:
    """A copy of the module without its parameters; with a device, over uninitialised ones there."""
    shell = copy.copy(experts)
    shell._parameters = {}
    shell._buffers, shell._modules = dict(experts._buffers), dict(experts._modules)
    for name, parameter in experts.named_parameters(recurse=False) if device else ():
        shell.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False))
    return shell
