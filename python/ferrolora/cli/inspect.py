"""`ferrolora inspect`: what a checkpoint or an adapter holds, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ferrolora.cli.console import megabytes, print_json, print_table
from ferrolora.io.checkpoint import CONFIG_NAME, Checkpoint, read_json
from ferrolora.nn.expert_stack import HEADER, PARTS, stack_from_state
from ferrolora.nn.experts import PROJECTIONS
from ferrolora.nn.quant_state import STATE_KEY, from_state
from ferrolora.spec import QuantSpec

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Model or adapter directory, or .safetensors file.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON.")] = False,
) -> None:
    """Say what a checkpoint or adapter holds: types, bits, sizes, targets."""
    if (path / ADAPTER_CONFIG).is_file():
        content = describe_adapter(path)
        checkpoint = Checkpoint(path / ADAPTER_WEIGHTS)
    else:
        checkpoint = Checkpoint(path)
        content = describe_checkpoint(checkpoint)
    if tensors:
        content["tensors"] = {
            name: {"dtype": _name(info.dtype), "shape": list(info.shape)} for name, info in checkpoint.tensors.items()
        }
    if as_json:
        print_json(content)
    else:
        _print(path, content)


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Sizes of the quantized weights by codec and of the other tensors by type.

    Args:
        checkpoint: quantized or not.

    Returns: `{"kind": "checkpoint", "bytes", "parts": [{"what", "tensors", "parameters", "bits", "bytes"}], …}`.
    """
    parts: dict[str, Counter[str]] = {}
    claimed: set[str] = set()
    layers: Counter[str] = Counter()
    with checkpoint.reading() as reader:
        for prefix in _quantized_prefixes(checkpoint.tensors):
            names = {name for name in checkpoint.tensors if name.startswith(prefix) and name != f"{prefix}bias"}
            packed = from_state({name: _header_or_meta(checkpoint, reader, name) for name in names}, prefix)
            size = sum(checkpoint.tensors[name].nbytes for name in names)
            _add(parts.setdefault(_codec(packed.spec), Counter()), packed.numel(), size)
            claimed |= names
            layers[prefix.rstrip(".").rpartition(".")[2]] += 1
        for weight in _packed_experts(checkpoint.tensors):
            names = {f"{weight}_{part}" for part in (*PARTS, HEADER)} & set(checkpoint.tensors)
            state = {name.removeprefix(f"{weight}_"): _header_or_meta(checkpoint, reader, name) for name in names}
            stack = stack_from_state(state, weight)
            size = sum(checkpoint.tensors[name].nbytes for name in names)
            _add(parts.setdefault(_codec(stack.spec), Counter()), stack.numel(), size)
            claimed |= names
            layers[weight.rpartition(".")[2]] += 1
    for name, info in checkpoint.tensors.items():
        if name not in claimed:
            _add(parts.setdefault(_name(info.dtype), Counter()), info.numel, info.nbytes)
    content: dict[str, Any] = {"kind": "checkpoint", "files": len(checkpoint.files), "bytes": checkpoint.nbytes}
    content["parts"] = [
        {"what": what, **count, "bits": round(8 * count["bytes"] / max(1, count["parameters"]), 3)}
        for what, count in parts.items()
    ]
    content["quantized_layers"] = dict(layers)
    config = checkpoint.path / CONFIG_NAME
    if config.is_file():
        fields = read_json(config)
        content["architectures"] = fields.get("architectures")
        content["quantization_config"] = fields.get("quantization_config")
    return content


def describe_adapter(path: Path) -> dict[str, Any]:
    """The method, targets and sizes of an adapter directory."""
    config = read_json(path / ADAPTER_CONFIG)
    checkpoint = Checkpoint(path / ADAPTER_WEIGHTS)
    modules = Counter(_adapted(name) for name in checkpoint.tensors)
    types = {_name(info.dtype) for info in checkpoint.tensors.values()}
    keys = ("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "use_rslora")
    return {
        "kind": "adapter",
        **{key: config[key] for key in keys if key in config},
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save"),
        "parameters": sum(info.numel for info in checkpoint.tensors.values()),
        "bytes": checkpoint.nbytes,
        "dtypes": sorted(types),
        "tensors_by_module": dict(modules),
    }


def _quantized_prefixes(names: Iterable[str]) -> list[str]:
    found = []
    for name in names:
        before, mark, _ = name.partition(STATE_KEY)
        if mark:
            found.append(before)
        elif name.endswith(".SCB"):
            found.append(name.removesuffix("SCB"))
    return found


def _packed_experts(names: Iterable[str]) -> list[str]:
    marks = tuple(f".{projection}_{HEADER}" for projection in PROJECTIONS)
    return [name.removesuffix(f"_{HEADER}") for name in names if name.endswith(marks)]


def _codec(spec: QuantSpec) -> str:
    blocks = f", blocks of {spec.block_size}" if spec.is_4bit else ""
    return spec.quant_type + blocks + (", double quantization" if spec.double_quant else "")


def _header_or_meta(checkpoint: Checkpoint, reader: Any, name: str) -> torch.Tensor:
    """The JSON text of a quantization state itself; of anything else the type and shape, without its data."""
    info = checkpoint.tensors[name]
    is_header = STATE_KEY in name or name.endswith(f"_{HEADER}")
    return reader[name] if is_header else torch.empty(info.shape, dtype=info.dtype, device="meta")


def _adapted(name: str) -> str:
    """`…layers.0.self_attn.q_proj.lora_A.weight` to `q_proj`."""
    before, mark, _ = name.partition(".lora_")
    return (before if mark else name.rpartition(".")[0]).rpartition(".")[2]


def _add(count: Counter[str], parameters: int, size: int) -> None:
    count.update({"tensors": 1, "parameters": parameters, "bytes": size})


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _print(path: Path, content: dict[str, Any]) -> None:
    print(f"{path}: {content['kind']}, {megabytes(content['bytes'])}")
    if content["kind"] == "adapter":
        hidden = {"kind", "bytes", "tensors", "tensors_by_module"}
        for key, value in content.items():
            if key not in hidden:
                print(f"{key}: {f'{value:,}' if key == 'parameters' else value}")
        print("tensors: " + ", ".join(f"{name} {count}" for name, count in content["tensors_by_module"].items()))
    else:
        rows = [
            (part["what"], str(part["tensors"]), f"{part['parameters']:,}", f"{part['bits']}", megabytes(part["bytes"]))
            for part in content["parts"]
        ]
        print_table(rows, ("type", "tensors", "parameters", "bits", "size"))
        if content["quantized_layers"]:
            print("quantized layers: " + ", ".join(f"{n} {c}" for n, c in content["quantized_layers"].items()))
    if "tensors" in content:
        listed = [(name, info["dtype"], "x".join(map(str, info["shape"]))) for name, info in content["tensors"].items()]
        print_table(listed, ("tensor", "type", "shape"))
