"""Diffusers: LoRA files that `pipeline.load_lora_weights` reads, and reading those that diffusers wrote.

Nothing of diffusers is imported: to `quantize_model` and `get_peft_model` a UNet is a torch module. Only the file has a
layout of its own: one for a pipeline, keys `<component>.<module>.lora_A.weight`, each component's configuration in the
header. Source: diffusers 0.42, `loaders/lora_base.py` and `loaders/peft.py`.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from ferrolora.adapters.config import PeftConfig, PeftType
from ferrolora.adapters.lora_config import LoraConfig
from ferrolora.errors import FormatError, UnsupportedError
from ferrolora.io.adapter import prepare_directory, write_tensors
from ferrolora.model.peft_model import PeftModel
from ferrolora.model.state_dict import get_peft_model_state_dict, set_peft_model_state_dict

WEIGHT_NAME = "pytorch_lora_weights.safetensors"

_METADATA_KEY = "lora_adapter_metadata"  # in the header: JSON of {"<component>.<field>": value}
_LORA_KEY = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)")
_SHELL = "base_model.model."  # before every module's path in PEFT's files, and in no key of diffusers'

# Starts that leave the base as it is: a pipeline has the base as it was saved.
_FREE_STARTS = (True, False, "gaussian", "eva")


def save_lora_weights(
    directory: str | PathLike[str],
    *,
    adapter_name: str | None = None,
    weight_name: str = WEIGHT_NAME,
    **components: PeftModel,
) -> Path:
    """Writes one file from which a pipeline loads the adapters of its parts: `save_lora_weights(path, unet=model)`.

    After `pipeline.load_lora_weights(path)` the pipeline computes what `model` does: the header holds the configuration
    whole, so that alpha, `rank_pattern` and `use_dora` arrive as they were.

    Args:
        directory: created if need be.
        adapter_name: which adapter of each model. Default None: its active one.
        weight_name: of the file. Default "pytorch_lora_weights.safetensors", where diffusers looks first.
        **components: models by what the pipeline calls them: `unet`, `transformer`, `text_encoder`, …

    Returns:
        The path of the file.

    Raises:
        TargetError: a model has no such adapter.
        UnsupportedError: the adapter has something that the layout has no place for: another method than LoRA, a fully
            trained module, base biases, or a start that changed the base (PiSSA, OLoRA, LoftQ).
    """
    if not components:
        raise UnsupportedError("save_lora_weights needs a model by its name in the pipeline: unet=…, transformer=…")
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for component, model in components.items():
        name = model.active_adapter if adapter_name is None else adapter_name
        found = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        config = model.peft_config[name].saved_as()
        _check(component, config, found)
        tensors.update({f"{component}.{key.removeprefix(_SHELL)}": tensor for key, tensor in found.items()})
        # How A and B started is of no use to a reader, and PEFT would run an initializer again.
        kept = config.to_dict() | {"inference_mode": False, "init_lora_weights": True, "eva_config": None}
        fields.update({f"{component}.{key}": value for key, value in kept.items()})
    path = prepare_directory(directory) / weight_name
    write_tensors(path, tensors, {_METADATA_KEY: json.dumps(fields, indent=2, sort_keys=True)})
    return path


def load_lora_weights(
    model: nn.Module,
    path: str | PathLike[str],
    component: str = "unet",
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """Puts the adapter of one component of diffusers' LoRA file into `model`, float or quantized.

    A file without a configuration in its header means what it means to diffusers: alpha = rank, so a scaling of 1.

    Args:
        model: the component; its targeted modules are wrapped in place.
        path: the file, or the directory that holds `pytorch_lora_weights.safetensors`.
        component: what the pipeline calls the model: "unet" (default), "transformer", "text_encoder", …
        adapter_name: its name in memory. Default "default".
        is_trainable: train it further. Default False: frozen, and in evaluation mode.

    Raises:
        FormatError: no such file, nothing in it for the component, keys of another layout than PEFT's, or tensors that
            do not fit the model.
    """
    file = Path(path) / WEIGHT_NAME if Path(path).is_dir() else Path(path)
    tensors, fields = _read(file, component)
    config = PeftConfig.from_dict(fields, where=str(file)) if fields else _inferred(tensors)
    config.inference_mode = not is_trainable
    made = PeftModel(model, config, adapter_name)
    result = set_peft_model_state_dict(made, {f"{_SHELL}{key}": value for key, value in tensors.items()}, adapter_name)
    if result.missing_keys or result.unexpected_keys:
        raise FormatError(
            f"{file} does not fit this {type(model).__name__}: {len(result.missing_keys)} tensors are missing and "
            f"{len(result.unexpected_keys)} have no place, the first is "
            f"{[*result.missing_keys, *result.unexpected_keys][0].removeprefix(_SHELL)!r}"
        )
    return made if is_trainable else made.eval()


def _check(component: str, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise UnsupportedError(f"{component}: diffusers' layout holds LoRA, not {config.peft_type}")
    if config.init_lora_weights not in _FREE_STARTS:
        raise UnsupportedError(
            f"{component}: init_lora_weights={config.init_lora_weights!r} changed the base, which a pipeline has as it "
            "was saved; merge_and_unload() and save the whole model instead"
        )
    other = [key for key in tensors if "lora_" not in key.rpartition(_SHELL)[2]]
    if other:
        raise UnsupportedError(
            f"{component}: diffusers' layout has no place for {other[0].removeprefix(_SHELL)}; train without "
            "modules_to_save, trainable_token_indices and bias"
        )


def _read(file: Path, component: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of one component, without its name before the keys."""
    if not file.is_file():
        raise FormatError(f"{file} does not exist; give a LoRA file of diffusers, or a directory with {WEIGHT_NAME}")
    with safe_open(file, "pt") as opened:
        header = opened.metadata() or {}
        keys = [key for key in opened.keys() if key.startswith(f"{component}.")]  # noqa: SIM118 - no mapping
        if not keys:
            names = sorted({key.partition(".")[0] for key in opened.keys()})  # noqa: SIM118
            raise FormatError(f"{file} holds nothing for component {component!r}; its keys begin with {names}")
        tensors = {key.removeprefix(f"{component}."): opened.get_tensor(key) for key in keys}
    foreign = [key for key in tensors if not _LORA_KEY.search(key)]
    if foreign:
        raise FormatError(f"{file}: {component}.{foreign[0]} is not in the layout with lora_A and lora_B")
    fields = json.loads(header.get(_METADATA_KEY, "{}"))
    own = {key.removeprefix(f"{component}."): v for key, v in fields.items() if key.startswith(f"{component}.")}
    return tensors, own


def _inferred(tensors: Mapping[str, Tensor]) -> LoraConfig:
    """The configuration of a file that has none: ranks as the tensors have them, each alpha the same."""
    ranks = {key.partition(".lora_B.")[0]: b.shape[1] for key, b in tensors.items() if key.endswith(".lora_B.weight")}
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != common}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        target_modules=list(ranks),
        use_dora=any(key.endswith(".lora_magnitude_vector") for key in tensors),
        lora_bias=any(key.endswith(".lora_B.bias") for key in tensors),
    )
