"""Making a loaded model, quantized or not, ready for training adapters."""

from typing import Any

import torch
from torch import Tensor, nn


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Freezes the base and turns on gradient checkpointing. Nothing is cast: embeddings and head keep their bytes.

    A frozen 16-bit weight gains nothing from a float32 copy: norms and losses compute in float32 inside, and what is
    trained, the adapters, is float32 already.

    Args:
        model: the base model, changed in place.
        use_gradient_checkpointing: recompute activations in the backward pass. Default True.
        gradient_checkpointing_kwargs: for `torch.utils.checkpoint`. Default {"use_reentrant": False}.

    Returns:
        `model`.
    """
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        enable_checkpointing(model, gradient_checkpointing_kwargs or {"use_reentrant": False})
        require_input_grads(model)
    return model


def enable_checkpointing(model: nn.Module, kwargs: dict[str, Any]) -> None:
    """Turns on gradient checkpointing by the name this release of transformers has for it, if the model has one."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable = getattr(model, name, None)
        if callable(enable):
            enable(kwargs)
            return


def is_checkpointing(model: nn.Module) -> bool:
    """Whether any part of the model recomputes its activations."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def require_input_grads(model: nn.Module) -> None:
    """Makes the embedding's output require a gradient: a checkpointed block is skipped when none of its inputs does."""
    enable = getattr(model, "enable_input_require_grads", None)
    if callable(enable):
        enable()
        return
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    if isinstance(embedding, nn.Module):
        embedding.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    if isinstance(output, torch.Tensor):
        output.requires_grad_(True)
