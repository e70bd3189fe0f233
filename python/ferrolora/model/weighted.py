"""One LoRA adapter made of several."""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ferrolora.adapters.combine import COMBINATIONS, check_combination
from ferrolora.adapters.lora_config import LoraConfig
from ferrolora.adapters.lora_layer import LoraLayer
from ferrolora.errors import UnsupportedError
from ferrolora.model.targets import smallest_suffixes

if TYPE_CHECKING:
    from ferrolora.model.peft_model import PeftModel


@torch.no_grad()
def add_weighted_adapter(
    model: "PeftModel",
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> None:
    """See `PeftModel.add_weighted_adapter`."""
    check_combination(combination_type, density, majority_sign_method)
    if len(adapters) != len(weights) or not adapters:
        raise UnsupportedError(f"{len(adapters)} adapters and {len(weights)} weights: give one weight to each adapter")
    configs = [_plain_lora(model, name) for name in adapters]
    layers = {
        path: layer
        for path, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and any(name in layer.r for name in adapters)
    }
    by_svd = combination_type.endswith("svd")
    ranks = [[layer.r[name] for name in adapters if name in layer.r] for layer in layers.values()]
    if combination_type == "cat":
        rank = max(sum(own) for own in ranks)
    elif by_svd:
        rank = svd_rank or max(max(own) for own in ranks)
    else:
        rank = ranks[0][0]
        if any(other != rank for own in ranks for other in own):
            raise UnsupportedError(
                f"combination_type={combination_type!r} needs adapters of one rank everywhere; "
                "'cat' and 'svd' take any ranks"
            )
    config = copy.deepcopy(configs[0])
    config.r, config.lora_alpha, config.use_rslora = rank, rank, False  # scaling 1: it goes into the matrices
    config.rank_pattern, config.alpha_pattern, config.init_lora_weights = {}, {}, True
    config.target_modules = smallest_suffixes(model.get_base_model(), list(layers))
    config.loftq_config, config.eva_config = {}, None
    model.add_adapter(adapter_name, config)
    for layer in layers.values():
        present = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.r]
        if combination_type == "cat":
            a, b = _concatenated(layer, present)
        elif by_svd:
            way = "linear" if combination_type == "svd" else combination_type.removesuffix("_svd")
            a, b = _decomposed(layer, present, way, density, majority_sign_method, rank)
        else:
            a, b = _factor_by_factor(layer, present, combination_type, density, majority_sign_method)
        new_a, new_b = layer.factors(adapter_name)
        new_a.zero_()
        new_b.zero_()
        new_a[: a.shape[0]] = a
        new_b[:, : b.shape[1]] = b


def _plain_lora(model: "PeftModel", name: str) -> LoraConfig:
    config = model.peft_config[name]
    if type(config) is not LoraConfig or config.use_dora or config.lora_bias or config.bias != "none":
        raise UnsupportedError(
            f"adapter {name!r}: only LoRA without DoRA, lora_bias and trained biases can be combined with others"
        )
    if config.modules_to_save or config.trainable_token_indices or config.target_parameters:
        raise UnsupportedError(
            f"adapter {name!r} has modules_to_save, trainable_token_indices or target_parameters; "
            "those cannot be combined"
        )
    return config


def _concatenated(layer: LoraLayer, present: Sequence[tuple[str, float]]) -> tuple[Tensor, Tensor]:
    pairs = [layer.factors(name) for name, _ in present]
    a = [pair[0] * weight * layer.scaling[name] for pair, (name, weight) in zip(pairs, present, strict=True)]
    return torch.cat(a), torch.cat([pair[1] for pair in pairs], dim=1)


def _factor_by_factor(
    layer: LoraLayer, present: Sequence[tuple[str, float]], way: str, density: float | None, election: str
) -> tuple[Tensor, Tensor]:
    """A and B are combined each for itself, with the root of weight·scaling on either; a sign goes to A."""
    pairs = [layer.factors(name) for name, _ in present]
    scaled = [weight * layer.scaling[name] for name, weight in present]
    roots = [math.sqrt(abs(value)) for value in scaled]
    signed = torch.tensor([math.copysign(root, value) for root, value in zip(roots, scaled, strict=True)])
    combine, kept = COMBINATIONS[way], 1.0 if density is None else density
    a = combine([pair[0] for pair in pairs], signed, kept, election)
    return a, combine([pair[1] for pair in pairs], torch.tensor(roots), kept, election)


def _decomposed(
    layer: LoraLayer,
    present: Sequence[tuple[str, float]],
    way: str,
    density: float | None,
    election: str,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """The deltas are combined as matrices, and the best approximation of rank `rank` is taken."""
    deltas = [layer.matrix(layer.delta_weight(name)) for name, _ in present]
    weights = torch.tensor([weight for _, weight in present])
    delta = COMBINATIONS[way](deltas, weights, 1.0 if density is None else density, election)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return vh[:rank], u[:, :rank] * s[:rank]
