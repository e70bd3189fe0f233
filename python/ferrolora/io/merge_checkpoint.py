"""A model directory and an adapter to a merged model directory: shard in, shard out, one layer in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ferrolora.adapters.base import AdapterLayer
from ferrolora.adapters.config import ModuleConfig, PeftConfig
from ferrolora.adapters.lora import is_transposed_linear
from ferrolora.adapters.registry import method_of
from ferrolora.errors import FormatError, UnsupportedError
from ferrolora.io.adapter import read_config, read_tensors
from ferrolora.io.checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    Checkpoint,
    SafetensorsWriter,
    copy_side_files,
    read_json,
    require_free,
    write_index,
    write_json,
)
from ferrolora.io.decoded_checkpoint import DecodedCheckpoint
from ferrolora.io.quantize_checkpoint import quantized_layout
from ferrolora.io.shard import TensorInfo
from ferrolora.model.targets import find_targets, saved_modules
from ferrolora.nn.quant_state import to_state
from ferrolora.ops.quantize import quantize
from ferrolora.spec import QuantSpec

_PREFIX = "base_model.model."
_NAME = "merged"

Progress = Callable[[str, int, int], None]  # (tensor name, bytes read so far, bytes in all)


@dataclass
class MergeSummary:
    """What a merge did.

    Attributes:
        merged: tensors that the adapter changed.
        retained: {weight: the share of the adapter's delta that survived quantization, ⟨Q(W+Δ) − Q(W), Δ⟩/⟨Δ, Δ⟩};
            empty without quantization. About 1 when it is quantized from the original weights; near 0 when W was on
            the grid already, so that rounding takes W+Δ back to W.
    """

    merged: list[str] = field(default_factory=list)
    retained: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MergePlan:
    """What a merge is told about the model.

    Attributes:
        model: the model on the meta device.
        names: {tensor of the checkpoint: parameter of the model}.
        quantized: tensors to quantize, empty for a float result.
        transposed: those of them that are stored `[K, N]`.
        spec: the codec for them.
        quantization_config: goes into the result's `config.json` then.
        dtype: of all other float tensors; None keeps each as it is.
        min_retained: the smallest mean share of the deltas that may survive quantization.
    """

    model: nn.Module
    names: Mapping[str, str]
    quantized: Collection[str] = ()
    transposed: Collection[str] = ()
    spec: QuantSpec | None = None
    quantization_config: Mapping[str, Any] | None = None
    dtype: torch.dtype | None = None
    min_retained: float = 0.8


def merge_checkpoint(
    source: Path,
    adapter: Path,
    destination: Path,
    plan: MergePlan,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeSummary:
    """Writes the model in `source` with the adapter in `adapter` in its weights. Memory is one layer and the adapter.

    Args:
        source: directory with `config.json` and safetensors shards; quantized ones are decoded first, and the result
            is the float model that training saw.
        adapter: directory of an adapter that changes modules (no virtual tokens).
        destination: directory to write; made if missing. `config.json` comes last.
        plan: the model, and what the result is to be.
        overwrite: replace what the destination holds.
        progress: called after every tensor.

    Raises:
        FormatError: a file that is missing or does not fit; a destination that is not free.
        UnsupportedError: an adapter that has no place in weights; or less of it survives than `min_retained`. Then
            the destination holds no `config.json`.
    """
    config = read_json(source / CONFIG_NAME)
    checkpoint = _decoded(source, config, plan) if config.pop("quantization_config", None) else Checkpoint(source)
    require_free(destination, overwrite, source, adapter)
    job = _Merge(plan, adapter)
    destination.mkdir(parents=True, exist_ok=True)
    for stale in [*destination.glob("*.safetensors"), destination / INDEX_NAME, destination / CONFIG_NAME]:
        stale.unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    size = 0
    for shard in checkpoint.files:
        job.write(checkpoint, shard, destination / shard.name, progress)
        written = Checkpoint(destination / shard.name)
        weight_map.update(dict.fromkeys(written.tensors, shard.name))
        size += written.nbytes
    job.finish()
    if (source / INDEX_NAME).is_file():
        write_index(destination, weight_map, size)
    copy_side_files(source, destination)
    extra = {} if plan.quantization_config is None else {"quantization_config": dict(plan.quantization_config)}
    kind = {} if plan.dtype is None else {"dtype": str(plan.dtype).removeprefix("torch.")}
    write_json(destination / CONFIG_NAME, {**config, **kind, **extra})
    return job.summary


def _decoded(source: Path, config: Mapping[str, Any], plan: MergePlan) -> Checkpoint:
    """A quantized checkpoint as the float one that it stands for."""
    transposed = {
        name
        for name, in_model in plan.names.items()
        if in_model.endswith(".weight") and is_transposed_linear(plan.model.get_submodule(in_model[: -len(".weight")]))
    }
    kind = config.get("dtype") or config.get("torch_dtype") or "float32"
    return DecodedCheckpoint(source, transposed, getattr(torch, kind))


class _Merge:
    """One adapter over the shards of a checkpoint."""

    def __init__(self, plan: MergePlan, adapter: Path) -> None:
        self.plan, self.summary, self.read = plan, MergeSummary(), 0
        self.config = PeftConfig.from_dict(read_config(adapter), where=str(adapter))
        if not isinstance(self.config, ModuleConfig):
            raise UnsupportedError(f"{adapter}: {self.config.peft_type} has virtual tokens, which no weight can hold")
        if getattr(self.config, "target_parameters", None):
            raise UnsupportedError(
                f"{adapter}: adapts experts (target_parameters), whose tensors a checkpoint holds one by one; "
                "load model and adapter, then save what merge_and_unload() gives"
            )
        self.tensors = {key.removeprefix(_PREFIX): value for key, value in read_tensors(adapter).items()}
        self.adapter = adapter
        saved = saved_modules(plan.model, self.config.modules_to_save)
        self.targets = set(find_targets(plan.model, self.config, saved))
        suffix = ".token_adapter.trainable_tokens_delta"
        rows = [key.removesuffix(suffix) for key in self.tensors if key.endswith(suffix)]
        self.rows = {f"{path}.weight": path for path in rows}
        self.used: set[str] = set()

    def write(self, checkpoint: Checkpoint, shard: Path, target: Path, progress: Progress | None) -> None:
        """Merges one shard into `target`."""
        plan = self.plan
        layout: dict[str, TensorInfo] = {}
        open_ended: list[str] = []
        for name in checkpoint.names_in(shard):
            info = checkpoint.tensors[name]
            if name in plan.quantized:
                assert plan.spec is not None
                shape = info.shape[::-1] if name in plan.transposed else info.shape
                fixed, names = quantized_layout(name, shape, plan.spec)
                layout |= fixed
                open_ended += names
            else:
                layout[name] = TensorInfo(self._dtype(info.dtype), info.shape)
        with checkpoint.reading() as reader, SafetensorsWriter(target, layout, open_ended) as writer:
            for name in checkpoint.names_in(shard):
                before = reader[name]
                after = self._merged(name, before, checkpoint, reader)
                if name in plan.quantized:
                    for key, part in self._quantized(name, before, after).items():
                        writer.write(key, part)
                else:
                    writer.write(name, after.to(layout[name].dtype))
                self.read += checkpoint.tensors[name].nbytes
                if progress is not None:
                    progress(name, self.read, checkpoint.nbytes)

    def finish(self) -> None:
        """Checks that the whole adapter went in, and that enough of it survived."""
        left = sorted(set(self.tensors) - self.used)
        if left:
            raise FormatError(
                f"{self.adapter} holds {len(left)} tensors for which the model has no place, the first is {left[0]!r}"
            )
        shares = list(self.summary.retained.values())
        if shares and sum(shares) / len(shares) < self.plan.min_retained:
            raise UnsupportedError(
                f"only {sum(shares) / len(shares):.0%} of the adapter survived quantization (least: {min(shares):.0%})"
                "; write 16 bits, or lower --min-retained"
            )

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.plan.dtype if self.plan.dtype is not None and dtype.is_floating_point else dtype

    def _merged(self, name: str, before: Tensor, checkpoint: Checkpoint, reader: Any) -> Tensor:
        """The tensor with the adapter in it, float32 if that changed it."""
        in_model = self.plan.names.get(name, name)
        path, _, leaf = in_model.rpartition(".")
        for key in (in_model, f"{path}.base_layer.{leaf}"):  # trained in full: a module or a bias
            if key in self.tensors:
                self.used.add(key)
                self.summary.merged.append(name)
                before = self.tensors[key].float()
        if path in self.targets and leaf == "weight":
            return self._adapted(name, path, before, checkpoint, reader)
        if path in self.targets and leaf == "bias" and self._changes_bias(path):
            stored = next(key for key, value in self.plan.names.items() if value == f"{path}.weight")
            layer = self._layer(path, reader[stored], before)
            return cast(Tensor, layer.merged_module([_NAME], torch.float32).bias).detach()
        if in_model in self.rows:
            return self._with_rows(name, self.rows[in_model], before)
        return before

    def _adapted(self, name: str, path: str, before: Tensor, checkpoint: Checkpoint, reader: Any) -> Tensor:
        stored_bias = next((key for key, value in self.plan.names.items() if value == f"{path}.bias"), None)
        bias = reader[stored_bias] if stored_bias in checkpoint.tensors else None
        layer = self._layer(path, before, bias)
        self.summary.merged.append(name)
        return cast(Tensor, layer.merged_module([_NAME], torch.float32).weight).detach()

    def _layer(self, path: str, weight: Tensor, bias: Tensor | None) -> AdapterLayer:
        """The wrapped module at `path` with its own tensors and those of the adapter, on the CPU in float32."""
        base = copy.deepcopy(self.plan.model.get_submodule(path)).to_empty(device="cpu").float()
        base.weight = nn.Parameter(weight.float(), requires_grad=False)
        if bias is not None:
            base.bias = nn.Parameter(bias.float(), requires_grad=False)
        wrap = method_of(self.config.peft_type).wrap
        assert wrap is not None
        layer = wrap(base, path, self.config)
        layer.add_adapter(_NAME, self.config, path, True)
        own = {key.removeprefix(f"{path}."): value for key, value in self.tensors.items() if key.startswith(f"{path}.")}
        layer.make_room(_NAME, own)
        for container in layer.containers:
            if _NAME not in layer.entries(container):
                continue
            entry = layer.entries(container)[_NAME]
            places = (
                {container: entry}
                if isinstance(entry, Tensor)
                else {f"{container}.{key}": value for key, value in entry.state_dict(keep_vars=True).items()}
            )
            for key, place in places.items():
                if key not in own or own[key].shape != place.shape:
                    got = "nothing" if key not in own else str(list(own[key].shape))
                    raise FormatError(f"{self.adapter}: {path}.{key} should be {list(place.shape)}, the file has {got}")
                with torch.no_grad():
                    place.copy_(own[key])
                self.used.add(f"{path}.{key}")
        return layer

    def _changes_bias(self, path: str) -> bool:
        return self.config.peft_type == "IA3" or f"{path}.lora_B.bias" in self.tensors

    def _with_rows(self, name: str, path: str, before: Tensor) -> Tensor:
        key = f"{path}.token_adapter.trainable_tokens_delta"
        asked = getattr(self.config, "trainable_token_indices", None)
        indices = asked
        if isinstance(asked, dict):
            indices = next(ids for place, ids in asked.items() if path == place or path.endswith(f".{place}"))
        after = before.float().clone()
        after[torch.tensor(list(indices or []))] = self.tensors[key].float()
        self.used.add(key)
        self.summary.merged.append(name)
        return after

    def _quantized(self, name: str, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """The parts of the quantized weight; notes how much of the delta survived."""
        spec = self.plan.spec
        assert spec is not None
        if name in self.plan.transposed:
            before, after = before.T, after.T
        packed = quantize(after.float().contiguous(), spec, name)
        delta = after.float() - before.float()
        energy = float(delta.square().sum())
        if energy > 0.0:
            moved = packed.dequantize(torch.float32) - quantize(before.float().contiguous(), spec, name).dequantize(
                torch.float32
            )
            self.summary.retained[name] = float((moved * delta).sum()) / energy
        prefix = name.removesuffix("weight")
        return {prefix + key: part for key, part in to_state(packed).items()}
