"""Making a loaded model, quantized or not, ready for training adapters."""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    """Turns on gradient checkpointing by the name the model has for it, if it has one."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        enable = getattr(model, name, None)
        if callable(enable):
            enable(kwargs)
            return
    enable = getattr(model, "enable_gradient_checkpointing", None)  # models of diffusion take the function itself
    if callable(enable):
        enable(lambda module, *inputs: checkpoint(module, *inputs, **kwargs))


def is_checkpointing(model: nn.Module) -> bool:
    """Whether any part of the model recomputes its activations."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def require_input_grads(model: nn.Module) -> None:
    """Makes what the embeddings put out require a gradient: a checkpointed block is skipped when no input of it does.

    Every embedding that a part of the model names, of pixels and sounds too; some put out a tuple (Swin).
    """
    named = {id(found): found for found in map(_input_embedding, model.modules()) if found is not None}
    for embedding in named.values():
        embedding.register_forward_hook(_require_grad)


def _input_embedding(module: nn.Module) -> nn.Module | None:
    find = getattr(module, "get_input_embeddings", None)
    try:
        found = find() if callable(find) else None
    except NotImplementedError:  # so transformers says that a model has none
        return None
    return found if isinstance(found, nn.Module) else None


def _require_grad(module: nn.Module, inputs: Any, output: Any) -> None:
    for value in output if isinstance(output, tuple) else (output,):
        if isinstance(value, Tensor) and value.is_floating_point():
            value.requires_grad_(True)
