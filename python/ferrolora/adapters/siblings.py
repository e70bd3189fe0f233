"""Layers that read the same x (q, k, v; gate, up): the first that is called computes all of them in one operator.

Nothing is assumed of names: who shares x is observed in a first round of calls, and a group whose results are not
fetched (a cross-attention whose keys have another source, a layer that is skipped) is given up.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from ferrolora.ops.linear import LowRank
from ferrolora.ops.linear_group import Packed, linear_group_packed


class Sibling(Protocol):
    """What a layer needs in order to be one of a group."""

    base_layer: nn.Module

    def fused_operand(self) -> LowRank | None:
        """The branch that a call would now hand to the base in one fused call; None if it would do anything else."""


class _State(NamedTuple):
    """Everything that a layer's result depends on, beside x."""

    base: nn.Module
    lora: LowRank
    versions: tuple[int, ...]
    modes: tuple[Any, ...]


def _state(base: nn.Module, lora: LowRank) -> _State:
    modes = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    versions = tuple(tensor._version for tensor in (lora.A, lora.B, *base.parameters()))
    return _State(base, lora, versions, modes)


def _same(a: _State, b: _State) -> bool:
    operands = a.base is b.base and a.lora.A is b.lora.A and a.lora.B is b.lora.B
    return operands and (a.lora[2:], a.versions, a.modes) == (b.lora[2:], b.versions, b.modes)


class _Results:
    """Outputs of one group for one x that wait to be fetched."""

    def __init__(self, x: Tensor, outputs: dict[int, tuple[_State, Tensor]]) -> None:
        self.x = x
        self.version = x._version
        self.outputs = outputs

    def take(self, layer: Sibling, x: Tensor, state: _State) -> Tensor | None:
        """The output of `layer`, if it is here and nothing has changed since."""
        if x is not self.x or x._version != self.version or id(layer) not in self.outputs:
            return None
        computed, y = self.outputs.pop(id(layer))
        return y if _same(computed, state) else None


class SharedInput:
    """The layers of one parent module, which may or may not be called with the same x."""

    def __init__(self, layers: Sequence[Sibling]) -> None:
        self._layers = {id(layer): layer for layer in layers}
        self._observing = True  # in the first round of calls
        self._seen: dict[int, int] = {}  # layer -> which of the inputs it had
        self._inputs: list[ref[Tensor]] = []
        self._groups: dict[int, tuple[int, ...]] = {}  # layer -> the group it is in
        self._results: _Results | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start afresh: `id`s and waiting results mean nothing there."""
        return {"layers": list(self._layers.values())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SharedInput.__init__(self, state["layers"])

    def forward(self, layer: Any, x: Tensor, lora: LowRank) -> Tensor:
        """`layer.base_layer.forward_with_low_rank(x, lora)`, by itself or out of a group's results."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or id(layer) not in self._layers:
            return _alone(layer, x, lora)
        if self._observing:
            self._observe(id(layer), x)
        if id(layer) not in self._groups:
            return _alone(layer, x, lora)
        # Read once: another thread may put its own results here, which are never mixed with these.
        results, state = self._results, _state(layer.base_layer, lora)
        if results is not None:
            y = results.take(layer, x, state)
            if not results.outputs:
                self._results = None
            if y is not None:
                return y
            if results.outputs:
                self._give_up(results)
                return _alone(layer, x, lora)
        return self._compute(layer, x, lora)

    def _observe(self, layer: int, x: Tensor) -> None:
        """Notes a call; the first repeated one ends the round, and those that had the same x become groups."""
        if layer not in self._seen:
            same = (i for i, seen in enumerate(self._inputs) if seen() is x)
            self._seen[layer] = next(same, len(self._inputs))
            self._inputs.append(ref(x))
            return
        by_input: dict[int, list[int]] = {}
        for seen, which in self._seen.items():
            by_input.setdefault(which, []).append(seen)
        self._groups = {key: tuple(group) for group in by_input.values() if len(group) > 1 for key in group}
        self._observing = False

    def _give_up(self, results: _Results) -> None:
        """Results were computed for a layer that then had another x, or was not called: it is in no group again."""
        for missed in results.outputs:
            self._groups.pop(missed, None)
        self._results = None

    def _compute(self, layer: Any, x: Tensor, lora: LowRank) -> Tensor:
        members = [(layer, lora)]
        for key in self._groups[id(layer)]:
            other: Any = self._layers[key]
            if other is not layer and key in self._groups and (operand := _operand(other, x)) is not None:
                members.append((other, operand))
        if len(members) == 1:
            return _alone(layer, x, lora)
        packed: list[Packed] = [member.base_layer.packed(branch) for member, branch in members]
        y, *others = linear_group_packed(x, packed)
        states = [_state(member.base_layer, branch) for member, branch in members[1:]]
        waiting = zip(members[1:], states, others, strict=True)
        self._results = _Results(x, {id(member): (state, out) for (member, _), state, out in waiting})
        return y


def _alone(layer: Any, x: Tensor, lora: LowRank) -> Tensor:
    y: Tensor = layer.base_layer.forward_with_low_rank(x, lora)
    return y


def _operand(layer: Any, x: Tensor) -> LowRank | None:
    """The branch of a sibling that can be computed now; None if its own call may differ from that.

    Its parameters may be elsewhere until it is called (offloaded, sharded), and hooks may change its x.
    """
    if layer._forward_pre_hooks or "forward" in vars(layer):
        return None
    lora: LowRank | None = layer.fused_operand()
    if lora is None:
        return None
    tensors: Iterable[Tensor] = (lora.A, lora.B, *layer.base_layer.parameters(), *layer.base_layer.buffers())
    here = all(type(tensor) in (Tensor, nn.Parameter) and tensor.device == x.device for tensor in tensors)
    return lora if here else None


def share_inputs(model: nn.Module) -> None:
    """Lets the adapter layers of one parent that have as many inputs, and a base that offers `packed`, share x."""
    for parent in model.modules():
        families: dict[int, list[Any]] = {}
        for child in parent.children():
            if hasattr(child, "fused_operand") and hasattr(child.base_layer, "packed"):
                base: Any = child.base_layer
                families.setdefault(base.in_features, []).append(child)
        for layers in families.values():
            shared = SharedInput(layers) if len(layers) > 1 else None
            for layer in layers:
                layer.shared_input = shared
