"""Adapter directories in PEFT's layout: adapter_config.json, adapter_model.safetensors, README.md.

Every file is written to a temporary sibling and renamed: a crash leaves the old file or the new one.
"""

import json
import os
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ferrolora.errors import FormatError, UnsupportedError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
CARD_NAME = "README.md"


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary sibling of `path`, then renames it onto `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_config(directory: str | PathLike[str]) -> dict[str, Any]:
    """The fields of `directory`/adapter_config.json.

    Raises:
        FormatError: the file is missing, or is not a JSON object.
    """
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise FormatError(f"{path} does not exist: an adapter directory holds {CONFIG_NAME} and {WEIGHTS_NAME}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise FormatError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def write_config(directory: str | PathLike[str], values: Mapping[str, Any]) -> None:
    """Writes `values` as `directory`/adapter_config.json with 2-space indent and sorted keys."""
    text = json.dumps(values, indent=2, sort_keys=True)
    path = prepare_directory(directory) / CONFIG_NAME
    replace_file(path, lambda temporary: _write_text(temporary, text))


def read_tensors(directory: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter directory, on the CPU, by the keys of the file.

    Reads adapter_model.safetensors, or the older adapter_model.bin with torch's weights-only unpickler.

    Raises:
        FormatError: neither file exists.
    """
    weights, pickled = Path(directory) / WEIGHTS_NAME, Path(directory) / PICKLED_WEIGHTS_NAME
    if weights.is_file():
        return load_file(weights)
    if pickled.is_file():
        tensors: dict[str, torch.Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
        return tensors
    raise FormatError(f"{directory} holds no {WEIGHTS_NAME} (and no {PICKLED_WEIGHTS_NAME})")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes safetensors with {"format": "pt"} and `metadata` in the header.

    The format knows no sharing: shared tensors are copied.
    """
    seen: set[int] = set()
    detached = {key: _exclusive(tensor, seen) for key, tensor in tensors.items()}
    header = {"format": "pt", **(metadata or {})}
    replace_file(path, lambda temporary: save_file(detached, temporary, metadata=header))


def write_adapter(
    directory: str | PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Writes one adapter: the tensors first, then the configuration that describes them."""
    write_tensors(prepare_directory(directory) / WEIGHTS_NAME, tensors)
    write_config(directory, config)


def write_card(directory: str | PathLike[str], config: Mapping[str, Any]) -> None:
    """Writes README.md, the model card of the Hub, unless somebody has already written one."""
    path = prepare_directory(directory) / CARD_NAME
    if not path.exists():
        replace_file(path, lambda temporary: _write_text(temporary, model_card(config)))


def model_card(config: Mapping[str, Any]) -> str:
    """The text of a model card: what the Hub needs to list the adapter under its base, and how to load it."""
    base, method = config.get("base_model_name_or_path"), str(config.get("peft_type", "")).lower()
    tags = [*([f"base_model:adapter:{base}"] if base else []), "ferrolora", method]
    head = [*([f"base_model: {base}"] if base else []), "library_name: peft", "tags:", *(f"- {tag}" for tag in tags)]
    if config.get("task_type") == "CAUSAL_LM":
        head.append("pipeline_tag: text-generation")
    rows = [f"| {key} | `{json.dumps(config[key])}` |" for key in ("r", "lora_alpha", "lora_dropout") if key in config]
    lines = ["---", *head, "---", "", f"# {config.get('peft_type')} adapter{f' for {base}' if base else ''}", ""]
    lines += ["| setting | value |", "|---|---|", *rows, ""] if rows else []
    lines += ["```python", "import ferrolora as fl", "", 'model = fl.PeftModel.from_pretrained(base, "this/directory")']
    return "\n".join([*lines, "```", "", f"The files are in the format of PEFT {config.get('peft_version')}.", ""])


def prepare_directory(directory: str | PathLike[str]) -> Path:
    """Creates `directory` if need be. Raises UnsupportedError when a file has that name."""
    path = Path(directory)
    if path.is_file():
        raise UnsupportedError(f"an adapter is a directory, and {path} is a file")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _exclusive(tensor: torch.Tensor, seen: set[int]) -> torch.Tensor:
    """`tensor` on the CPU, contiguous, in a storage that no tensor before it used (`seen` collects them)."""
    plain = tensor.detach().cpu().contiguous()
    if plain.untyped_storage().data_ptr() in seen:
        plain = plain.clone()
    seen.add(plain.untyped_storage().data_ptr())
    return plain
