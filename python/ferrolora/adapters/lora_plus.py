"""LoRA+: B learns faster than A."""

from typing import Any

from torch import nn

from ferrolora.errors import UnsupportedError


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    lr_ratio: float = 16.0,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer, in which B has `lr_ratio` times the rate of A.

    Args:
        model: a model with adapters; only its trainable parameters are taken.
        lr: rate of A and of everything else that is no B and no embedding.
        lr_ratio: rate of B over that of A. Default 16.
        weight_decay: of all groups; biases and other vectors get none. Default 0.
        embedding_lr: rate of LoRA on embeddings. Default 1e-6.

    Returns:
        Groups with `params`, `lr` and `weight_decay`; empty ones are left out.

    Raises:
        UnsupportedError: a rate or ratio that is not above 0, or nothing to train.

    Source: LoRA+, arXiv 2402.12354.
    """
    if lr <= 0 or lr_ratio <= 0 or embedding_lr <= 0:
        raise UnsupportedError(f"lora_plus_groups: lr={lr}, lr_ratio={lr_ratio}, embedding_lr={embedding_lr}: give > 0")
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = lr * lr_ratio if ".lora_B." in name else lr
        rate = embedding_lr if "lora_embedding_" in name else rate
        decay = weight_decay if parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    if not groups:
        raise UnsupportedError("lora_plus_groups: the model has no trainable parameter")
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
