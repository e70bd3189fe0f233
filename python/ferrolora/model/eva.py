"""EVA: LoRA's A from the data, and the ranks to the layers whose inputs need them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ferrolora.adapters.init.eva import InputDirections
from ferrolora.adapters.lora import LoraLinear
from ferrolora.adapters.lora_config import LoraConfig
from ferrolora.errors import TargetError, UnsupportedError
from ferrolora.model.inject import replace_module
from ferrolora.model.targets import smallest_suffixes

if TYPE_CHECKING:
    from ferrolora.model.peft_model import PeftModel

_DEFAULTS = {"rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False}
_DEFAULTS |= {"adjust_scaling_factors": True}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: "PeftModel", dataloader: Iterable[Mapping[str, Any]], adapter_name: str = "default"
) -> "PeftModel":
    """Fills A with the directions along which the inputs of each layer vary most, before training; B stays zero.

    The budget of Σ r directions goes to the layers by the share of variance a direction explains: a layer may get up
    to rho·r, or none, and is then no longer adapted. Rows are the positions that `attention_mask` and, with
    `use_label_mask`, `labels` do not exclude.

    Args:
        model: a PeftModel whose adapter has `init_lora_weights="eva"`; changed in place.
        dataloader: batches (dicts of the model's inputs); read until the directions stay (cosine above tau) or it ends.
        adapter_name: default "default".

    Returns:
        `model`.

    Raises:
        UnsupportedError: the adapter is not LoRA with "eva", or `eva_config` has unknown keys.
        TargetError: the data is empty.

    Source: EVA, arXiv 2410.07170.
    """
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig) or config.init_lora_weights != "eva":
        raise UnsupportedError(f"adapter {adapter_name!r} was not made with init_lora_weights='eva'")
    unknown = sorted(set(config.eva_config or {}) - set(_DEFAULTS))
    if unknown:
        raise UnsupportedError(f"LoraConfig: eva_config has unknown keys {unknown}; known are {sorted(_DEFAULTS)}")
    options: dict[str, Any] = _DEFAULTS | (config.eva_config or {})
    base = model.get_base_model()
    layers = {
        path: layer for path, layer in base.named_modules() if isinstance(layer, LoraLinear) and adapter_name in layer.r
    }
    directions = {
        path: InputDirections(min(math.ceil(layer.r[adapter_name] * options["rho"]), layer.in_features))
        for path, layer in layers.items()
    }
    _observe(model, layers, directions, dataloader, options)
    _assign(model, config, adapter_name, layers, directions, options)
    return model


def _observe(
    model: "PeftModel",
    layers: Mapping[str, LoraLinear],
    directions: Mapping[str, InputDirections],
    dataloader: Iterable[Mapping[str, Any]],
    options: Mapping[str, Any],
) -> None:
    """Runs batches through the base until no layer's directions move any more."""
    rows: list[Tensor | None] = [None]
    settled: set[str] = set()

    def collector(path: str) -> Callable[[Any, Any], None]:
        def collect(module: Any, inputs: Any) -> None:
            x = inputs[0].detach()
            mask = rows[0]
            fits = mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]
            flat = x[mask] if fits else x.flatten(0, -2)
            if len(flat):
                before = directions[path].vectors
                directions[path].update(flat)
                if _unmoved(before, directions[path].vectors, options["tau"]):
                    settled.add(path)

        return collect

    training, handles = model.training, []
    model.eval()
    try:
        handles = [layer.base_layer.register_forward_pre_hook(collector(path)) for path, layer in layers.items()]
        with model.disable_adapter():
            for batch in dataloader:
                rows[0] = _counted(batch, options)
                model(**batch)
                if len(settled) == len(layers):
                    break
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    if any(each.vectors is None for each in directions.values()):
        raise TargetError("initialize_lora_eva_weights: the data left some layer without a single input row")


def _counted(batch: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor | None:
    mask = batch.get("attention_mask")
    counted = None if mask is None else mask.bool()
    labels = batch.get("labels")
    if options["use_label_mask"] and isinstance(labels, Tensor) and labels.dim() == 2:
        wanted = labels != options["label_mask_value"]
        counted = wanted if counted is None else counted & wanted
    return counted


def _unmoved(before: Tensor | None, after: Tensor | None, tau: float) -> bool:
    if before is None or after is None or before.shape != after.shape:
        return False
    return bool((torch.nn.functional.cosine_similarity(before, after).abs() >= tau).all())


def _assign(
    model: "PeftModel",
    config: LoraConfig,
    name: str,
    layers: Mapping[str, LoraLinear],
    directions: Mapping[str, InputDirections],
    options: Mapping[str, Any],
) -> None:
    budget = sum(layer.r[name] for layer in layers.values())
    shares = [(float(share), path) for path, each in directions.items() for share in each.explained()]
    ranks = Counter(path for _, path in sorted(shares, key=lambda pair: -pair[0])[:budget])
    base = model.get_base_model()
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    for path, layer in layers.items():
        rank, old = ranks[path], layer.r[name]
        if rank == 0:
            layer.delete_adapter(name)
            if not layer.adapter_names():
                replace_module(base, layer, layer.base_layer)
            continue
        alpha = layer.lora_alpha[name] * (rank / old if options["adjust_scaling_factors"] else 1.0)
        vectors, values = directions[path].vectors, directions[path].values
        assert vectors is not None and values is not None
        a = vectors[:rank] / values[:rank, None] if options["whiten"] else vectors[:rank]
        layer.grow(name, rank)
        layer.factors(name)[0].copy_(a)
        rank_pattern[path], alpha_pattern[path] = rank, alpha
    config.rank_pattern = {path: rank for path, rank in rank_pattern.items() if rank != config.r}
    config.alpha_pattern = {path: alpha for path, alpha in alpha_pattern.items() if alpha != config.lora_alpha}
    config.target_modules = smallest_suffixes(base, list(rank_pattern))
    for path in rank_pattern:
        layers[path].rescale(name, config, path)
