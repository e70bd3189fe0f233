"""A model directory in float to one in 4 or 8 bits: shard in, shard out, one tensor in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ferrolora.errors import FormatError
from ferrolora.io.checkpoint import (
    CHECKSUMS_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    Checkpoint,
    SafetensorsWriter,
    copy_side_files,
    read_json,
    require_free,
    sha256,
    write_checksums,
    write_index,
    write_json,
)
from ferrolora.io.shard import PICKLED_SUFFIX, TensorInfo
from ferrolora.nn.quant_state import STATE_KEY, state_keys, to_state
from ferrolora.ops.quantize import quantize
from ferrolora.spec import QuantSpec
from ferrolora.tensor import expected_parts

PROGRESS_NAME = "quantize-progress.json"  # stands in the destination only until it is complete

Progress = Callable[[str, int, int], None]  # (tensor name, bytes read so far, bytes in all)


@dataclass(frozen=True)
class TensorReport:
    """What quantization did to one weight.

    Attributes:
        name: of the tensor.
        shape: `[N, K]`.
        bytes_before, bytes_after: of the weight, scales included after.
        relative_error: `‖W − Ŵ‖₂ / ‖W‖₂`, 0.0 for a zero weight.
        max_error: the largest `|w − ŵ|`.
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    relative_error: float
    max_error: float


@dataclass
class QuantizeSummary:
    """Bytes of all tensors before and after, and a report a quantized weight if it was asked for.

    Attributes:
        quantized: how many weights were quantized.
        resumed: how many shards were complete from an earlier, interrupted run.
    """

    bytes_before: int = 0
    bytes_after: int = 0
    quantized: int = 0
    resumed: int = 0
    reports: list[TensorReport] = field(default_factory=list)


def quantize_checkpoint(
    source: Path,
    destination: Path,
    weights: Collection[str],
    spec: QuantSpec,
    quantization_config: dict[str, Any],
    transposed: Collection[str] = (),
    measure: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizeSummary:
    """Quantize the named weights of a model directory into another; every other tensor is copied as it is.

    Each shard is written to a temporary file and renamed when complete, `config.json` comes last. An interrupted or
    killed run with the same arguments goes on: a shard whose SHA-256 is the one noted when it was complete is not
    written again. `SHA256SUMS` in the destination keeps the checksums of the shards.

    Args:
        source: directory with `config.json` and shards: safetensors, or pickles of tensors (`pytorch_model*.bin`).
        destination: directory to write; made if missing.
        weights: names of the 2-D tensors to quantize.
        spec: the codec.
        quantization_config: goes into the destination's `config.json`.
        transposed: those of `weights` that are stored `[K, N]`; they are written as `[N, K]`.
        measure: compute the error of each weight.
        overwrite: replace a complete checkpoint in the destination.
        progress: called after every tensor.

    Raises:
        FormatError: source unreadable, already quantized, or lacking one of `weights`; destination not free.
        QuantizationError: a weight holds NaN or infinity; names it.
    """
    checkpoint = Checkpoint(source)
    config = read_json(source / CONFIG_NAME)
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise FormatError(f"{source / CONFIG_NAME}: the model is quantized already ({method})")
    unknown = sorted(set(weights) - set(checkpoint.tensors))
    if unknown:
        raise FormatError(f"{source}: holds no tensor {unknown[0]!r} ({len(unknown)} of {len(weights)} are missing)")
    marker = _marker(checkpoint, weights, spec)
    require_free(destination, True, source)
    finished = _claim(destination, marker, overwrite)

    summary = QuantizeSummary(bytes_before=checkpoint.nbytes, quantized=len(weights))
    job = _Job(checkpoint, set(weights), set(transposed), spec, measure, progress, summary)
    weight_map: dict[str, str] = {}
    for shard in checkpoint.files:
        target = destination / _target_name(shard)
        if target.is_file() and finished.get(target.name) == sha256(target):
            summary.resumed += 1
            job.skip(shard)
        else:
            job.write(shard, target)
            finished[target.name] = sha256(target)
            write_json(destination / PROGRESS_NAME, {"run": marker, "finished": finished})
        written = Checkpoint(target)
        weight_map.update(dict.fromkeys(written.tensors, target.name))
        summary.bytes_after += written.nbytes
    if len(checkpoint.files) > 1 or (source / INDEX_NAME).is_file():
        write_index(destination, weight_map, summary.bytes_after)
    write_checksums(destination, finished)
    copy_side_files(source, destination)
    write_json(destination / CONFIG_NAME, {**config, "quantization_config": quantization_config})
    (destination / PROGRESS_NAME).unlink()
    return summary


class _Job:
    """One run over the shards of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: set[str],
        transposed: set[str],
        spec: QuantSpec,
        measure: bool,
        progress: Progress | None,
        summary: QuantizeSummary,
    ) -> None:
        self.checkpoint, self.weights, self.transposed, self.spec = checkpoint, weights, transposed, spec
        self.measure, self.progress, self.summary = measure, progress, summary
        self.bytes_read = 0

    def write(self, shard: Path, target: Path) -> None:
        """Quantize one shard into `target`."""
        names = self.checkpoint.names_in(shard)
        layout: dict[str, TensorInfo] = {}
        open_ended: list[str] = []
        for name in names:
            if name in self.weights:
                fixed, open_names = quantized_layout(name, self._shape(name), self.spec)
                layout |= fixed
                open_ended += open_names
            else:
                layout[name] = self.checkpoint.tensors[name]
        with self.checkpoint.reading() as reader, SafetensorsWriter(target, layout, open_ended) as writer:
            for name in names:
                tensor = reader[name]
                if name in self.weights:
                    for key, part in self._quantize(name, tensor).items():
                        writer.write(key, part)
                else:
                    writer.write(name, tensor)
                self._advance(name)

    def skip(self, shard: Path) -> None:
        """Count a shard that is complete already."""
        for name in self.checkpoint.names_in(shard):
            self._advance(name)

    def _advance(self, name: str) -> None:
        self.bytes_read += self.checkpoint.tensors[name].nbytes
        if self.progress is not None:
            self.progress(name, self.bytes_read, self.summary.bytes_before)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.checkpoint.tensors[name].shape
        if len(shape) != 2:
            raise FormatError(f"{name}: a linear weight has 2 dimensions, this tensor is {list(shape)}")
        return shape[::-1] if name in self.transposed else shape

    def _quantize(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        weight = tensor.T.contiguous() if name in self.transposed else tensor
        packed = quantize(weight, self.spec, name)
        if self.measure:
            error = (weight.float() - packed.dequantize(torch.float32)).flatten()
            size = weight.float().norm()
            relative = float(error.norm() / size) if size > 0 else 0.0
            largest = float(error.abs().max())
            shape = tuple(weight.shape)
            self.summary.reports.append(TensorReport(name, shape, weight.nbytes, packed.nbytes, relative, largest))
        prefix = name.removesuffix("weight")
        return {prefix + key: part for key, part in to_state(packed).items()}


def quantized_layout(name: str, shape: tuple[int, ...], spec: QuantSpec) -> tuple[dict[str, TensorInfo], list[str]]:
    """The stored tensors of the quantized weight `name`: types and shapes, and the names whose length varies."""
    parts = expected_parts(spec, torch.Size(shape))
    known = {
        "weight": parts["codes"],
        "weight.absmax": parts["absmax"],
        "SCB": parts["absmax"],
        "weight.nested_absmax": parts["nested_absmax"],
        "weight.quant_map": (torch.float32, (16,)),
        "weight.nested_quant_map": (torch.float32, (256,)),
        "weight_format": (torch.uint8, ()),
    }
    prefix = name.removesuffix("weight")
    layout, open_ended = {}, []
    for key in state_keys(spec):
        if key.startswith(STATE_KEY):
            open_ended.append(prefix + key)
            continue
        part = known[key]
        assert part is not None  # state_keys names nested scales only with double quantization
        layout[prefix + key] = TensorInfo(part[0], tuple(part[1]))
    return layout, open_ended


def _marker(checkpoint: Checkpoint, weights: Collection[str], spec: QuantSpec) -> dict[str, Any]:
    stats = {file.name: file.stat() for file in checkpoint.files}
    return {
        "spec": asdict(spec),
        "weights": sorted(weights),
        "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def _target_name(shard: Path) -> str:
    """The shard's name; of a pickle, the name it would have as safetensors: `model-….safetensors`."""
    if shard.suffix != PICKLED_SUFFIX:
        return shard.name
    return shard.stem.removeprefix("pytorch_") + ".safetensors"


def _claim(destination: Path, marker: dict[str, Any], overwrite: bool) -> dict[str, str]:
    """Make the destination ours; the checksums of the shards that an earlier, interrupted run of ours completed."""
    progress_file = destination / PROGRESS_NAME
    if not overwrite and progress_file.is_file():
        noted = read_json(progress_file)
        if noted.get("run") == marker:
            for left_over in destination.glob(".*.tmp"):  # of a writer that was killed
                left_over.unlink()
            return dict(noted.get("finished", {}))
    require_free(destination, overwrite)
    destination.mkdir(parents=True, exist_ok=True)
    others = [destination / name for name in (INDEX_NAME, CONFIG_NAME, CHECKSUMS_NAME)]
    for stale in [*destination.glob("*.safetensors"), *others]:
        stale.unlink(missing_ok=True)
    write_json(progress_file, {"run": marker, "finished": {}})
    return {}
