"""PEFT's own models over packed layers: every method, LoRA in one fused operation, merging that is exact or refused.

`prepare(base)` goes before `get_peft_model`, `accelerate(model)` after it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ferrolora.errors import UnsupportedError
from ferrolora.model.conv1d import as_conv1d
from ferrolora.model.peft_model import PeftModel
from ferrolora.nn import QuantLinear, read_as_float
from ferrolora.ops.linear import LowRank


def prepare(base: nn.Module) -> int:
    """Let PEFT see float weights where `base` has packed ones, so that all its methods work over them.

    Without it LoRA, IA3, OFT and others that only call their base layer work too; methods that ask for the weight's
    shape, type or values (LoHa, LoKr, DeLoRA, HRA, SHiRA, …) fail. The weight is decoded at each use. The parameters
    of the model, its files and its memory stay as they are. accelerate's offloading does not work afterwards.

    Args:
        base: the model, before `get_peft_model`.

    Returns:
        How many packed layers it has.

    Raises:
        UnsupportedError: it has none.
    """
    count = read_as_float(base)
    if count == 0:
        raise UnsupportedError(
            f"{type(base).__name__} has no QuantLinear; load it with FerroloraConfig, or call quantize_model first"
        )
    return count


def accelerate(model: Any) -> int:
    """Fuse the plain LoRA layers of a PEFT model with their packed bases, and make merging of all its layers safe.

    The model stays PEFT's: its files, its adapters' names, `disable_adapter`, Trainer and TRL are untouched. A LoRA
    layer with one active adapter computes `x·deq(W)ᵀ + scaling·B(A(drop(x)))` in one operation; with several, a
    variant (DoRA, …), a mixed batch or hooks on its base it computes as before. The fused dropout draws other masks
    from torch's generator than PEFT's. `merge_and_unload()` then gives float layers `deq(W) + ΔW`; `merge_adapter()`
    is refused, since a packed weight cannot take an update exactly.

    Args:
        model: a `peft.PeftModel`. Adapters added to it later share its layers; layers added later need another call.

    Returns:
        How many layers over a packed weight the model has now that are accelerated or safe to merge.

    Raises:
        UnsupportedError: the model has no PEFT layer over a packed weight, or a method cast its tensors to the type of
            the codes, which `prepare` avoids.
    """
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer

    count = 0
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer) or not isinstance(layer.get_base_layer(), QuantLinear):
            continue
        _refuse_cast_adapters(layer)
        kind: Any = type(layer)
        if not issubclass(kind, _SafeMerge):
            layer.__class__ = _fused(kind) if kind is LoraLinear else _safe(kind)
        count += 1
    if count == 0:
        raise UnsupportedError(
            f"{type(model).__name__} has no PEFT layer over a QuantLinear; load the base with FerroloraConfig, or call "
            "quantize_model, before get_peft_model"
        )
    return count


def to_peft(model: PeftModel) -> Any:
    """The same base with the same adapters as a `peft.PeftModel`, accelerated: for trainers that accept nothing else.

    The base is shared, the adapters' values are copied in the format of PEFT's files; `model` is empty afterwards.
    The active adapter can be trained. A method that writes another's files (AdaMix) becomes that other.

    Args:
        model: ours; not merged, with one active adapter.

    Raises:
        UnsupportedError: several adapters are active, or none.
    """
    import peft

    if len(model.active_adapters) != 1:
        raise UnsupportedError(f"to_peft needs exactly one active adapter, not {model.active_adapters}")
    active, names = model.active_adapter, list(model.peft_config)
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        folders = {name: Path(directory) if name == "default" else Path(directory, name) for name in names}
        base: Any = model.unload()
        packed = any(isinstance(module, QuantLinear) for module in base.modules())
        if packed:
            prepare(base)
        made = peft.PeftModel.from_pretrained(base, folders[active], active, is_trainable=True)
        for name in names:
            if name != active:
                made.load_adapter(folders[name], name)
    if packed and not made.peft_config[active].is_prompt_learning:
        accelerate(made)
    return made


def _refuse_cast_adapters(layer: Any) -> None:
    """UniLoRA takes the type of the base weight for its own; in int8 nothing of it is left."""
    base = layer.get_base_layer()
    for name in (*layer.adapter_layer_names, *layer.other_param_names):
        entries: Any = getattr(layer, name, None)
        for key in entries.keys() if hasattr(entries, "keys") else ():
            if getattr(entries[key], "dtype", None) == base.codes.dtype and not base.reads_as_float:
                raise UnsupportedError(
                    f"{type(layer).__module__} stores {name}[{key!r}] as {base.codes.dtype}, the type of the packed "
                    "weight; call prepare(base) before get_peft_model"
                )


class _SafeMerge:
    """Goes before a class of PEFT's tuner layers, over a packed base."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's merge, over a float base; refused over a packed one."""
        layer: Any = self
        if isinstance(layer.get_base_layer(), QuantLinear):
            raise UnsupportedError(
                "merge_adapter() would have to write into a packed weight, which cannot hold the sum exactly; "
                "merge_and_unload() gives float layers with it"
            )
        parent: Any = super()
        parent.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base alone, packed; or a float layer with the update merged into the decoded weight."""
        layer: Any = self
        base = layer.get_base_layer()
        if merge and isinstance(base, QuantLinear):
            with torch.device("meta"):
                plain = nn.Linear(base.in_features, base.out_features, bias=False)
            plain.weight = nn.Parameter(base.dequantize(), requires_grad=False)
            plain.bias = base.bias
            layer.base_layer = plain.train(base.training)
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            if base.conv1d:
                return as_conv1d(layer.get_base_layer())
        merged: nn.Module = layer.get_base_layer()
        return merged


class _FusedForward(_SafeMerge):
    """Goes before PEFT's plain LoRA layer."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's forward, in one operation where the layer is a plain one."""
        layer: Any = self
        name = _fusible(layer) if not args and not kwargs else None
        if name is None:
            parent: Any = super()
            unfused: Tensor = parent.forward(x, *args, **kwargs)
            return unfused
        dropout = layer.lora_dropout[name]
        rate = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
        branch = LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], rate)
        fused: Tensor = layer.base_layer.forward_with_low_rank(x, branch)
        return fused


def _fusible(layer: Any) -> str | None:
    """The one active adapter, if the layer computes nothing but base + scaling·B·A; else None."""
    base = layer.base_layer
    if layer.disable_adapters or layer.merged or not isinstance(base, QuantLinear):
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant or layer.lora_B[names[0]].bias is not None:
        return None
    parts = (base, layer.lora_A[names[0]], layer.lora_B[names[0]])
    return None if any(map(_is_hooked, parts)) else names[0]


def _is_hooked(module: Any) -> bool:
    """Whether calling the module does more than its forward: torch's hooks, or accelerate's."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


@cache
def _fused(kind: Any) -> Any:
    return type(f"Fused{kind.__name__}", (_FusedForward, kind), {})


@cache
def _safe(kind: Any) -> Any:
    return type(f"Safe{kind.__name__}", (_SafeMerge, kind), {})
