"""Another adapter's weights in the place of one that is there: no module is added, none is replaced."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ferrolora.adapters.config import PeftConfig
from ferrolora.adapters.lora_config import LoraConfig
from ferrolora.adapters.lora_layer import LoraLayer
from ferrolora.errors import FormatError, UnsupportedError
from ferrolora.model import files

if TYPE_CHECKING:
    from ferrolora.model.peft_model import PeftModel


@torch.no_grad()
def hotswap_adapter(model: "PeftModel", directory: Path, name: str) -> None:
    """See `PeftModel.hotswap_adapter`."""
    from ferrolora.io.adapter import read_tensors

    config = files.load_config(directory, is_trainable=False)
    old = model.peft_config[name]
    for given in (config, old):
        if type(given) is not LoraConfig or given.use_dora or given.lora_bias or given.bias != "none":
            raise UnsupportedError("hotswap_adapter exchanges plain LoRA adapters (no DoRA, lora_bias, trained biases)")
        if given.target_parameters:
            raise UnsupportedError("hotswap_adapter does not exchange adapters with target_parameters; load it anew")
    tensors = read_tensors(directory)
    layers = {
        f"base_model.model.{path}": layer
        for path, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and name in layer.r
    }
    taken: set[str] = set()
    for path, layer in layers.items():
        a_key, b_key = _keys(layer, path)
        a, b = tensors.get(a_key), tensors.get(b_key)
        if a is not None and b is not None:
            taken |= {a_key, b_key}
            _put(layer, name, a, b, config, path.removeprefix("base_model.model."))
        else:  # the new adapter does not touch this module
            for factor in layer.factors(name):
                factor.zero_()
    left = sorted(set(tensors) - taken)
    if left:
        raise FormatError(
            f"{directory} holds {len(left)} tensors for which adapter {name!r} has no place, the first is {left[0]!r}; "
            "load it with load_adapter() instead"
        )
    config.target_modules, config.inference_mode = old.target_modules, old.inference_mode  # type: ignore[attr-defined]
    model.peft_config[name] = config


def _keys(layer: LoraLayer, path: str) -> tuple[str, str]:
    first, second = layer.containers[:2]
    suffix = "" if isinstance(layer.entries(first), nn.ParameterDict) else ".weight"
    return f"{path}.{first}{suffix}", f"{path}.{second}{suffix}"


def _put(layer: LoraLayer, name: str, a: Tensor, b: Tensor, config: PeftConfig, path: str) -> None:
    """Copies A and B into the first ranks and zeroes the rest; a larger rank makes the parameters larger."""
    assert isinstance(config, LoraConfig)
    layer.rescale(name, config, path)
    if layer.factors(name)[0].shape[0] < a.shape[0]:
        layer.grow(name, a.shape[0])
    for place, value, dim in zip(layer.factors(name), (a.flatten(1), b.flatten(1)), (0, 1), strict=True):
        place.zero_()
        place.narrow(dim, 0, value.shape[dim]).copy_(value)
