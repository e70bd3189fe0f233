"""Layers that read the same x (q, k, v; gate, up): the first that is called computes all of them in one operator.

Which layers those are is found by one forward pass on an example, not guessed from names, and never changes by
itself: a checkpointed region must save in its second run what it saved in its first.
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


class InputGroup(Protocol):
    """What an adapter layer hands its fused call to."""

    def forward(self, layer: Any, x: Tensor, lora: LowRank) -> Tensor:
        """`layer.base_layer.forward_with_low_rank(x, lora)`."""


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
    """Layers that are called with the same x, in the order in which they are called.

    The first one's call computes all. Another one's call fetches its result, or computes it by itself if its x, its
    parameters or a mode are not those that it was computed with. Results that nobody fetches are kept until the next.
    """

    def __init__(self, layers: Sequence[Sibling]) -> None:
        self._layers = tuple(layers)
        self._results: _Results | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the results that wait: they belong to a call of the original."""
        return {"_layers": self._layers, "_results": None}

    def forward(self, layer: Any, x: Tensor, lora: LowRank) -> Tensor:
        """`layer.base_layer.forward_with_low_rank(x, lora)`, by itself or out of the group's results."""
        if torch.compiler.is_compiling() or x.device.type != "cpu":
            return _alone(layer, x, lora)
        if layer is self._layers[0]:
            return self._compute(layer, x, lora)
        # Read once: another thread may put its own results here, which are never mixed with these.
        results = self._results
        if results is None:
            return _alone(layer, x, lora)
        y = results.take(layer, x, _state(layer.base_layer, lora))
        if not results.outputs:
            self._results = None
        return _alone(layer, x, lora) if y is None else y

    def _compute(self, leader: Any, x: Tensor, lora: LowRank) -> Tensor:
        members = [(leader, lora)]
        for other in self._layers[1:]:
            operand = _operand(other, x)
            if operand is not None:
                members.append((other, operand))
        if len(members) == 1:
            return _alone(leader, x, lora)
        packed: list[Packed] = [member.base_layer.packed(branch) for member, branch in members]
        y, *others = linear_group_packed(x, packed)
        waiting = zip(members[1:], others, strict=True)
        self._results = _Results(
            x, {id(member): (_state(member.base_layer, branch), out) for (member, branch), out in waiting}
        )
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


class _Observer:
    """Stands in for a `SharedInput` during the example: notes which layers have the same x."""

    def __init__(self) -> None:
        self._inputs: dict[int, tuple[ref[Tensor], list[Sibling]]] = {}
        self._calls: dict[int, int] = {}
        self.groups: list[list[Sibling]] = []

    def forward(self, layer: Any, x: Tensor, lora: LowRank) -> Tensor:
        self._calls[id(layer)] = self._calls.get(id(layer), 0) + 1
        known = self._inputs.get(id(x))
        if known is None or known[0]() is not x:  # new, or an id that was somebody else's
            known = (ref(x), [])
            self._inputs[id(x)] = known
            self.groups.append(known[1])
        known[1].append(layer)
        return _alone(layer, x, lora)

    def called_once(self, layer: Sibling) -> bool:
        """Whether the layer was called with one x only."""
        return self._calls[id(layer)] == 1


def share_inputs(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[str, ...]]:
    """Compute adapted layers that read the same tensor together, with one packing of it and one gradient.

    The values are those of the single layers, bit for bit; the gradient of the shared tensor is summed in float32 and
    rounded once. Runs `model(*args, **kwargs)` once, in evaluation mode without gradients, to see which layers these
    are; random numbers are left as they were. Call it again after layers were added or replaced.

    Args:
        model: a model with LoRA over packed linear layers.
        args: an example of what the model is called with; a row of one token shows as much as a batch.
        kwargs: likewise.

    Returns:
        The names of the layers of each group, in the order in which they are called. CPU tensors only: elsewhere, and
        under `torch.compile`, the layers stay single.
    """
    layers: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "fused_operand") and hasattr(module.base_layer, "packed")
    }
    observer = _Observer()
    training = {module: module.training for module in model.modules()}
    for layer in layers.values():
        layer.shared_input = observer
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            model(*args, **kwargs)
    finally:
        for module, mode in training.items():
            module.training = mode
        for layer in layers.values():
            layer.shared_input = None
    names = {id(layer): name for name, layer in layers.items()}
    found = []
    for group in observer.groups:
        members = [layer for layer in group if observer.called_once(layer)]
        if len(members) > 1:
            shared = SharedInput(members)
            for member in members:
                layers[names[id(member)]].shared_input = shared
            found.append(tuple(names[id(member)] for member in members))
    return found
