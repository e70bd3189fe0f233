"""A `PeftModel`'s adapters as directories: written, read, uploaded. The bytes are `ferrolora.io.adapter`'s."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ferrolora.adapters.config import PeftConfig
from ferrolora.errors import FormatError
from ferrolora.model.config import file_fields
from ferrolora.model.state_dict import (
    LoadResult,
    adapter_keys,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
    tensors_by_name,
)

if TYPE_CHECKING:
    from ferrolora.model.peft_model import PeftModel

# Trainer's checkpoint folders, and the file from which it resumes a model of any kind.
_CHECKPOINT_FOLDER = re.compile(r"checkpoint-\d+")
_RESUME_NAME = "model.safetensors"


def save(
    model: "PeftModel",
    directory: str | PathLike[str],
    names: Sequence[str],
    save_embedding_layers: bool | Literal["auto"],
    state_dict: Mapping[str, Tensor] | None,
) -> None:
    """Writes adapters: "default" into the directory itself, others into a subfolder each.

    In a folder `checkpoint-<step>` also `model.safetensors`: all adapters under their names in memory.
    """
    from ferrolora.io.adapter import prepare_directory, write_adapter, write_card, write_tensors

    root = prepare_directory(directory)
    for name in names:
        fields = file_fields(model.get_base_model(), model.peft_config[name])
        tensors = get_peft_model_state_dict(model, state_dict, name, save_embedding_layers)
        place = root if name == "default" else root / name
        write_adapter(place, fields, tensors)
        write_card(place, fields)
    if _CHECKPOINT_FOLDER.fullmatch(root.name):
        values = tensors_by_name(model) if state_dict is None else state_dict
        write_tensors(root / _RESUME_NAME, {key: values[key] for key in adapter_places(model)})


def save_card(model: "PeftModel", directory: str | PathLike[str]) -> None:
    """Writes README.md if there is none."""
    from ferrolora.io.adapter import write_card

    write_card(directory, file_fields(model.get_base_model(), model.peft_config[model.active_adapter]))


def locate(model_id: str | PathLike[str], **hub: Any) -> Path:
    """The directory of a saved adapter, downloaded if `model_id` is a repository on the Hub."""
    from ferrolora.io.hub import local_directory

    return local_directory(model_id, **hub)


def load_config(directory: Path, is_trainable: bool) -> PeftConfig:
    """The configuration in `directory`, frozen unless `is_trainable`."""
    config = PeftConfig.from_pretrained(directory)
    config.inference_mode = not is_trainable
    return config


def load(model: "PeftModel", directory: Path, name: str) -> LoadResult:
    """Copies the tensors in `directory` into adapter `name`.

    Raises:
        FormatError: the file lacks a tensor of the adapter, or holds one that the model has no place for.
        ShapeError: a tensor has another shape than its place.
    """
    from ferrolora.io.adapter import read_tensors

    result = set_peft_model_state_dict(model, read_tensors(directory), name)
    if result.missing_keys:
        raise FormatError(
            f"{directory} lacks {len(result.missing_keys)} tensors of adapter {name!r} of this model, "
            f"the first is {result.missing_keys[0]!r}"
        )
    if result.unexpected_keys:
        raise FormatError(
            f"{directory} holds {len(result.unexpected_keys)} tensors for which the model with its "
            f"adapter_config.json has no place, the first is {result.unexpected_keys[0]!r}; is it for another base?"
        )
    return result


def upload(model: "PeftModel", repo_id: str, **options: Any) -> str:
    """Uploads what `save_pretrained` writes as one commit; returns its URL."""
    from ferrolora.io.hub import upload_directory

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return upload_directory(Path(directory), repo_id, **options)


def adapter_places(model: "PeftModel") -> list[str]:
    """The names in memory of every tensor that belongs to an adapter, each once."""
    places = (adapter_keys(model, name, config).values() for name, config in model.peft_config.items())
    encoders = [f"prompt_encoder.{key}" for key in model.prompt_encoder.state_dict()]
    return list(dict.fromkeys([*(place for group in places for place in group), *encoders]))
