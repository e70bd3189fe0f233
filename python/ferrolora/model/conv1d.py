"""GPT-2's Conv1D keeps its weight `[K, N]`: where a packed linear stood for one, a float model must hold one again."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ferrolora.nn import QuantLinear


def conv1d_paths(model: nn.Module) -> list[str]:
    """Where packed linears stand for a Conv1D; a wrapped one has the path of its wrapper."""
    return [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and module.conv1d
    ]


def restore_conv1d(model: nn.Module, paths: Sequence[str]) -> None:
    """Puts a Conv1D with their values in the place of the float linears at `paths`: files of the model expect it."""
    for path in paths:
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(path, as_conv1d(linear))


def as_conv1d(linear: nn.Linear) -> nn.Module:
    """A Conv1D with the values of a float linear; the bias is shared."""
    # Not at the top: this module is imported while transformers is being imported.
    from transformers.pytorch_utils import Conv1D

    conv: Any = Conv1D(0, 0)  # type: ignore[no-untyped-call]  # untyped
    conv.nf, conv.nx = linear.out_features, linear.in_features
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous(), linear.weight.requires_grad)
    conv.bias = linear.bias
    made: nn.Module = conv.train(linear.training)
    return made
