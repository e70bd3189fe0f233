"""Every method that adapts a linear layer: output and gradients against plain torch in float64, over every base."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ferrolora as fl
from ferrolora.adapters.registry import method_of
from ferrolora.nn import QuantLinear
from tiny import twins
from tiny.methods import BASES

TWINS: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "LoRA": (fl.LoraConfig(r=4, lora_alpha=6), twins.lora),
    "DoRA": (fl.LoraConfig(r=4, lora_alpha=6, use_dora=True), twins.dora),
    "IA3": (fl.IA3Config(target_modules=["layer"]), twins.ia3),
    "IA3 feed-forward": (
        fl.IA3Config(target_modules=["layer"], feedforward_modules=["layer"]),
        twins.ia3_feedforward,
    ),
    "LoHa as low rank": (fl.LoHaConfig(r=2, alpha=5), twins.loha),
    "LoHa as a matrix": (fl.LoHaConfig(r=7, alpha=5), twins.loha),
    "AdaLoRA": (fl.AdaLoraConfig(init_r=5, lora_alpha=6, total_step=9), twins.adalora),
}


def made(config: Any, base: str, bias: bool = True) -> Any:
    linear: nn.Module = nn.Linear(64, 48, bias=bias)
    spec = BASES[base]
    if spec is not None:
        linear = QuantLinear.from_linear(linear, spec)  # type: ignore[arg-type]
    wrap = method_of(config.peft_type).wrap
    assert wrap is not None
    layer = wrap(linear, "layer", config)
    layer.add_adapter("a", config, "layer", True)
    layer.activate(["a"], True)
    with torch.no_grad():
        for parameter in layer.adapter_parameters("a"):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def parameters(layer: Any) -> dict[str, nn.Parameter]:
    """By the key in a file."""
    found = {}
    for container in layer.containers:
        entries = layer.entries(container)
        if "a" in entries:
            entry = entries["a"]
            found.update(
                {container: entry}
                if isinstance(entry, nn.Parameter)
                else {f"{container}.{key}": value for key, value in entry.named_parameters()}
            )
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", TWINS)
def test_output_and_gradients_equal_plain_torch(method: str, base: str, bias: bool) -> None:
    config, twin = TWINS[method]
    layer = made(config, base, bias)
    x, upstream = torch.randn(5, 3, 64), torch.randn(5, 3, 48)
    own = parameters(layer)
    inputs = x.clone().requires_grad_()
    y = layer(inputs)
    y.backward(upstream)

    wide = {key: value.detach().double().requires_grad_() for key, value in own.items()}
    x64 = x.double().requires_grad_()
    bias64 = None if layer.bias is None else layer.bias.detach().double()
    weight = layer.float_weight().double()
    expected = twin(x64, weight, bias64, wide, getattr(layer, "scaling", {}).get("a", 1.0))
    expected.backward(upstream.double())

    # Sums of at most 64·r² products in float32, each rounded by 2^-24 of values of order 10: far below 2e-4.
    # (LoHa of rank 7 has the largest sums.)
    close = {"atol": 2e-4, "rtol": 1e-4}
    torch.testing.assert_close(y.double(), expected, **close)
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad.double(), x64.grad, **close)
    for key, value in own.items():
        assert value.grad is not None, key
        torch.testing.assert_close(value.grad.double(), wide[key].grad, **close, msg=lambda text, k=key: f"{k}: {text}")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", TWINS)
def test_a_merge_keeps_the_output_and_is_undone_bit_for_bit(method: str, base: str) -> None:
    layer = made(TWINS[method][0], base).eval()
    x = torch.randn(7, 64)
    before, stored = layer(x), {key: value.clone() for key, value in layer.base_layer.state_dict().items()}
    layer.merge(["a"])
    torch.testing.assert_close(layer(x), before, atol=2e-4, rtol=1e-4)
    for _ in range(99):
        layer.unmerge()
        layer.merge(["a"])
    layer.unmerge()
    after = layer.base_layer.state_dict()
    assert after.keys() == stored.keys()
    assert all(torch.equal(after[key], value) for key, value in stored.items())
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", TWINS)
def test_a_merge_is_a_snapshot(method: str, base: str) -> None:
    layer = made(TWINS[method][0], base).eval()
    x = torch.randn(7, 64)
    layer.merge(["a"])
    merged = layer(x)
    with torch.no_grad():
        for parameter in layer.adapter_parameters("a"):
            parameter.add_(1)
    assert torch.equal(layer(x), merged)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", TWINS)
def test_rows_of_a_mixed_batch_equal_those_of_separate_batches(method: str, base: str) -> None:
    config = TWINS[method][0]
    layer = made(config, base).eval()
    layer.add_adapter("b", config, "layer", True)
    with torch.no_grad():
        for parameter in layer.adapter_parameters("b"):
            parameter.add_(0.2 * torch.randn_like(parameter))
    from ferrolora.adapters.rows import RowGroups

    x = torch.randn(5, 3, 64)
    names = ["a", "b", "__base__", "a", "b"]
    expected = torch.stack(
        [layer.forward_as(x[i : i + 1], [] if name == "__base__" else [name])[0] for i, name in enumerate(names)]
    )
    layer.row_groups = RowGroups(names)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    # two rows for each of the batch, as beams have them
    twice = layer(x.repeat_interleave(2, 0))
    torch.testing.assert_close(twice, expected.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)
    with pytest.raises(fl.ShapeError, match="adapter_names has 5 entries"):
        layer(torch.randn(7, 64))
