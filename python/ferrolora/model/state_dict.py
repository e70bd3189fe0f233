"""An adapter's tensors: their names in a file (PEFT's, without adapter names) and in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ferrolora.adapters.base import AdapterLayer
from ferrolora.adapters.config import PeftConfig
from ferrolora.adapters.modules_to_save import ModulesToSaveWrapper
from ferrolora.adapters.prompt_base import PromptEncoder
from ferrolora.errors import ShapeError, TargetError, UnsupportedError
from ferrolora.model.inject import bias_choice, bias_parameters, wrappers


class LoadResult(NamedTuple):
    """What `set_peft_model_state_dict` could not place, by the keys of the file."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def adapter_keys(model: nn.Module, adapter_name: str, config: PeftConfig) -> dict[str, str]:
    """{key in a file: key in `model.state_dict()`} of one adapter, read off the modules themselves.

    Args:
        model: the `PeftModel`, so that keys begin with `base_model.model.`.
        adapter_name: whose tensors.
        config: its configuration; says which biases belong to it.
    """
    keys: dict[str, str] = {}
    for path, layer in wrappers(model):
        if isinstance(layer, ModulesToSaveWrapper):
            if adapter_name in layer.modules_to_save:
                # PEFT holds the base of virtual tokens without the shell that is around it otherwise
                file_path = path.replace("base_model.model.", "base_model.", 1) if config.is_prompt_learning else path
                for key in layer.modules_to_save[adapter_name].state_dict():
                    keys[f"{file_path}.{key}"] = f"{path}.modules_to_save.{adapter_name}.{key}"
            continue
        for container in layer.containers:
            entries = layer.entries(container)
            if adapter_name not in entries:
                continue
            entry, place = entries[adapter_name], f"{path}.{container}"
            if isinstance(entry, Tensor):
                keys[place] = f"{place}.{adapter_name}"
            else:
                keys.update({f"{place}.{key}": f"{place}.{adapter_name}.{key}" for key in entry.state_dict()})
    if bias_choice(config) != "none":
        keys.update({path: path for path, _ in bias_parameters(model, bias_choice(config))})
    return keys


def embedding_keys(model: nn.Module) -> dict[str, str]:
    """The same for the weights of the input embedding and the output head, as far as they are not in an adapter."""
    keys: dict[str, str] = {}
    for finder in ("get_input_embeddings", "get_output_embeddings"):
        find = getattr(model, finder, None)
        module = find() if callable(find) else None
        module = module.base_layer if isinstance(module, AdapterLayer) else module
        for path, candidate in model.named_modules():
            if module is not None and candidate is module and not isinstance(module, ModulesToSaveWrapper):
                keys.update({f"{path}.{key}": f"{path}.{key}" for key in module.state_dict()})
    return keys


def embeddings_were_resized(model: nn.Module, config: PeftConfig) -> bool:
    """Whether the vocabulary differs from that of the base on disk, whose embedding would then not fit the adapter.

    A base that is not a directory here counts as not resized: nothing is asked of the Hub while saving.
    """
    path = Path(config.base_model_name_or_path or "") / "config.json"
    now = getattr(getattr(model, "config", None), "vocab_size", None)
    if now is None or not config.base_model_name_or_path or not path.is_file():
        return False
    before = json.loads(path.read_text(encoding="utf-8")).get("vocab_size")
    return before is not None and before != now


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter by the keys of a file; they share memory with the model.

    Args:
        model: a `PeftModel`.
        state_dict: the model's state dict, when it was gathered from shards; default `model.state_dict()`.
        adapter_name: which adapter. Default "default".
        save_embedding_layers: also the weights of the input embedding and the output head. Default "auto": if the
            vocabulary was resized (see `embeddings_were_resized`).

    Raises:
        TargetError: the model has no such adapter.
        UnsupportedError: a tensor is divided over processes.
    """
    config = _config(model, adapter_name)
    keys = adapter_keys(model, adapter_name, config)
    if save_embedding_layers == "auto":
        save_embedding_layers = embeddings_were_resized(model, config)
    if save_embedding_layers:
        keys.update(embedding_keys(model))
    tensors = tensors_by_name(model) if state_dict is None else state_dict
    found = _to_file(model, adapter_name, config, {key: tensors[place].detach() for key, place in keys.items()})
    found |= prompt_encoder(model, adapter_name).to_file() if config.is_prompt_learning else {}
    _refuse_parts(found)
    return found


@torch.no_grad()
def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> LoadResult:
    """Copies tensors with the keys of a file into adapter `adapter_name`; types are converted to the model's.

    A key of the file that names a tensor of the base (a saved embedding) is copied there.

    Args:
        model: a `PeftModel` that has the adapter.
        peft_model_state_dict: tensors by the keys of a file.
        adapter_name: where they go. Default "default".

    Returns:
        The adapter's keys that the file lacks, and the file's keys that the model lacks.

    Raises:
        ShapeError: a tensor has another shape than its place.
        TargetError: the model has no such adapter.
    """
    config = _config(model, adapter_name)
    if config.is_prompt_learning:
        prompt_encoder(model, adapter_name).from_file(peft_model_state_dict)
        rest = {key: value for key, value in peft_model_state_dict.items() if key.startswith("base_model.")}
        peft_model_state_dict = rest
    for path, layer in wrappers(model):
        if isinstance(layer, AdapterLayer) and adapter_name in layer.adapter_names():
            layer.make_room(adapter_name, _below(path, peft_model_state_dict))
    keys = adapter_keys(model, adapter_name, config)
    places = tensors_by_name(model)
    unexpected = []
    for key, tensor in peft_model_state_dict.items():
        place = places.get(keys.get(key, key))
        if place is None:
            if not _is_duplicate(model, key):
                unexpected.append(key)
            continue
        if place.shape != tensor.shape:
            raise ShapeError(
                f"{key}: the file has {list(tensor.shape)}, adapter {adapter_name!r} of this model has "
                f"{list(place.shape)}; it was made with another rank, or for another base"
            )
        place.copy_(tensor)
    return LoadResult([key for key in keys if key not in peft_model_state_dict], unexpected)


def prompt_encoder(model: nn.Module, name: str) -> PromptEncoder:
    """The encoder of an adapter with virtual tokens."""
    encoder = model.get_submodule(f"prompt_encoder.{name}")
    assert isinstance(encoder, PromptEncoder)
    return encoder


def _refuse_parts(tensors: Mapping[str, Tensor]) -> None:
    """Raises UnsupportedError for what FSDP2 (a DTensor) or ZeRO-3 (an empty stand-in) has left a part of."""
    for key, tensor in tensors.items():
        if hasattr(tensor, "full_tensor") or tuple(tensor.shape) == (0,):
            raise UnsupportedError(
                f"{key} is divided over processes; call ferrolora.integrations.sharding.adapter_state_dict(model) in "
                "every one of them, and give the result to save_pretrained as state_dict"
            )


def _to_file(model: nn.Module, name: str, config: PeftConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Lets each layer turn its own tensors into what a file holds of them."""
    for path, layer in wrappers(model):
        if isinstance(layer, AdapterLayer) and name in layer.adapter_names():
            own = _below(path, tensors)
            saved = layer.to_file(name, own, config, path.removeprefix("base_model.model."))
            if saved is not own:
                tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{path}.")}
                tensors.update({f"{path}.{key}": value for key, value in saved.items()})
    return tensors


def _below(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under `path`, by the rest of their keys."""
    return {key.removeprefix(f"{path}."): value for key, value in tensors.items() if key.startswith(f"{path}.")}


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name they have; unlike `state_dict()` this packs nothing for a file."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _is_duplicate(model: nn.Module, key: str) -> bool:
    """Whether PEFT's `bias="all"` wrote this bias of a fully trained module a second time under its wrapper's name."""
    owner, _, rest = key.partition(".modules_to_save.")
    saved = {path for path, layer in wrappers(model) if isinstance(layer, ModulesToSaveWrapper)}
    return bool(rest) and owner in saved


def _config(model: nn.Module, adapter_name: str) -> PeftConfig:
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise TargetError(f"the model has no adapter {adapter_name!r}; it has {sorted(configs)}")
    return configs[adapter_name]
