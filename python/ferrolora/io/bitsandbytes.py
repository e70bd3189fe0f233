"""Layers and checkpoints to and from bitsandbytes' own form.

The bytes are the same, so nothing is decoded or quantized again; bitsandbytes itself need not be installed.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ferrolora.errors import FormatError, UnsupportedError
from ferrolora.io.checkpoint import (
    CHECKSUMS_NAME,
    CONFIG_NAME,
    INDEX_NAME,
    Checkpoint,
    copy_side_files,
    read_json,
    require_free,
    temporary_sibling,
    write_json,
)
from ferrolora.nn import QuantLinear
from ferrolora.nn.quant_state import STATE_KEY, from_state, to_state
from ferrolora.spec import QuantSpec

LABEL = "bitsandbytes"


def layer_from_state(state: Mapping[str, Tensor], prefix: str = "", dtype: torch.dtype | None = None) -> QuantLinear:
    """The layer that a state dict of `bitsandbytes.nn.Linear4bit` or `Linear8bitLt` describes.

    Args:
        state: a state dict; other layers may be in it.
        prefix: of the layer, with its trailing dot. Default "".
        dtype: the float type of an 8-bit weight, which its state does not record. Default None: float32.

    Returns:
        A QuantLinear that shares the tensors of state; codec, shape and type are those the state records.

    Raises:
        FormatError: there is no quantized weight at prefix, or one of its entries disagrees; names the key.
    """
    qt = from_state(state, prefix, dtype=dtype)
    bias = state.get(f"{prefix}bias")
    if bias is not None and tuple(bias.shape) != (qt.shape[0],):
        raise FormatError(f"{prefix}bias must be [{qt.shape[0]}], not {list(bias.shape)}")
    return QuantLinear.from_quant_tensor(qt, None if bias is None else nn.Parameter(bias))


def layer_from_module(module: nn.Module, dtype: torch.dtype | None = None) -> QuantLinear:
    """The same layer as a quantized `bitsandbytes.nn.Linear4bit` or `Linear8bitLt`, sharing its tensors.

    Args:
        module: the layer; quantized, that is, moved to its device once.
        dtype: as in `layer_from_state`.

    Raises:
        FormatError: the layer is not quantized yet.
    """
    layer = layer_from_state(module.state_dict(), dtype=dtype)
    original = getattr(module, "bias", None)
    if layer._parameters["bias"] is not None and original is not None:
        layer.bias.requires_grad_(original.requires_grad)
    return layer.train(module.training)


def prequantized(layer: QuantLinear) -> tuple[Tensor, dict[str, Tensor]]:
    """What `bitsandbytes.nn.Params4bit.from_prequantized(data, quantized_stats)` takes to hold this layer's weight.

    Args:
        layer: an nf4 or fp4 layer.

    Returns:
        The packed weight and the other entries of its state, without the prefix `weight.`.

    Raises:
        UnsupportedError: the layer is int8; bitsandbytes reads that from the state dict itself.
    """
    if not layer.spec.is_4bit:
        raise UnsupportedError(f"from_prequantized takes nf4 and fp4 weights, not {layer.spec.quant_type}")
    state = to_state(layer.quant_tensor())
    weight = state.pop("weight")
    return weight, {key.removeprefix("weight."): tensor for key, tensor in state.items()}


def spec_of_label(label: Mapping[str, Any]) -> QuantSpec:
    """The codec that a `quantization_config` with `quant_method: bitsandbytes` names.

    The block size of a stored weight stands beside it and not here; a weight quantized while loading gets 64.

    Raises:
        FormatError: another method, or neither 4 nor 8 bits.
    """
    method = label.get("quant_method")
    if method != LABEL:
        raise FormatError(f"quantization_config: quant_method is {method!r}, not {LABEL!r}")
    if label.get("load_in_8bit", label.get("_load_in_8bit", False)):
        return QuantSpec("int8")
    if label.get("load_in_4bit", label.get("_load_in_4bit", False)):
        double_quant = bool(label.get("bnb_4bit_use_double_quant", False))
        return QuantSpec(label.get("bnb_4bit_quant_type", "fp4"), 64, double_quant)
    raise FormatError("quantization_config: neither load_in_4bit nor load_in_8bit is set")


def label_of_spec(spec: QuantSpec, skip_modules: Iterable[str] = (), compute_dtype: str = "float32") -> dict[str, Any]:
    """The `quantization_config` by which transformers gives weights of `spec` to bitsandbytes.

    Args:
        spec: of the stored weights.
        skip_modules: names of the linear layers that are stored in float.
        compute_dtype: in which bitsandbytes multiplies 4-bit weights. Default "float32".
    """
    label: dict[str, Any] = {"quant_method": LABEL, "llm_int8_skip_modules": sorted(skip_modules) or None}
    if not spec.is_4bit:
        return label | {"load_in_8bit": True}
    return label | {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": spec.quant_type,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
    }


def export_checkpoint(source: Path, destination: Path, overwrite: bool = False) -> None:
    """Write the quantized model directory `source` as one that transformers loads with bitsandbytes.

    The weights are copied byte for byte; only the label in `config.json` changes.

    Args:
        source: a model directory that ferrolora quantized.
        destination: directory to write; made if missing.
        overwrite: replace what destination holds. Default False.

    Raises:
        FormatError: source is not one of ferrolora's, or destination is not free.
    """
    config = read_json(source / CONFIG_NAME)
    stored = config.get("quantization_config", {})
    if stored.get("quant_method") != "ferrolora":
        raise FormatError(f"{source / CONFIG_NAME}: quant_method is {stored.get('quant_method')!r}, not 'ferrolora'")
    require_free(destination, overwrite, source)
    spec = QuantSpec(stored["quant_type"], stored["block_size"], stored["double_quant"])
    checkpoint = Checkpoint(source)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    label = label_of_spec(spec, _float_layers(checkpoint), dtype)
    destination.mkdir(parents=True, exist_ok=True)
    names = [file.name for file in checkpoint.files]
    for name in [*names, *(n for n in (INDEX_NAME, CHECKSUMS_NAME) if (source / n).is_file())]:
        temporary = temporary_sibling(destination / name)
        shutil.copyfile(source / name, temporary)
        temporary.replace(destination / name)
    copy_side_files(source, destination)
    write_json(destination / CONFIG_NAME, {**config, "quantization_config": label})


def _float_layers(checkpoint: Checkpoint) -> list[str]:
    """Modules whose 2-D weight is not quantized: bitsandbytes must be told to leave them alone."""
    quantized = {name.partition(".weight.")[0] for name in checkpoint.tensors if f".{STATE_KEY}" in name}
    quantized |= {name.removesuffix(".SCB") for name in checkpoint.tensors if name.endswith(".SCB")}
    weights = [name for name, info in checkpoint.tensors.items() if name.endswith(".weight") and len(info.shape) == 2]
    return [name for weight in weights if (name := weight.removesuffix(".weight")) not in quantized]
