"""Layers to and from the real bitsandbytes."""

import pytest
import torch
from torch import Tensor, nn

import ferrolora as fl
from ferrolora.io.bitsandbytes import layer_from_module, layer_from_state, prequantized
from ferrolora.nn import QuantLinear

bnb = pytest.importorskip("bitsandbytes")
N, K = 40, 128  # whole blocks a row: bitsandbytes' own CPU decoder is wrong elsewhere

every_4bit = pytest.mark.parametrize(
    ("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
)


def linear_4bit(quant_type: str, double_quant: bool, storage: torch.dtype = torch.uint8) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        K,
        N,
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=storage,
        compute_dtype=torch.float32,
    )
    quantized: nn.Module = layer.to("cpu")
    return quantized


def close(a: Tensor, b: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Two float32 sums of K products each, in any order: K + 8 roundings of the sum of magnitudes, twice."""
    bound = 2 * (K + 8) * 2.0**-24 * (x.abs() @ weight.abs().T + 1.0)  # bias below 1
    return bool(((a - b).abs() <= bound).all())


@every_4bit
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_layer_of_theirs_becomes_ours_with_the_same_outputs(
    quant_type: str, double_quant: bool, storage: torch.dtype
) -> None:
    theirs = linear_4bit(quant_type, double_quant, storage)
    ours = layer_from_module(theirs)
    assert ours.spec == fl.QuantSpec(quant_type, 64, double_quant)
    x = torch.randn(5, K)
    assert close(ours(x), theirs(x), x, ours.dequantize())
    state = theirs.state_dict()
    mine = ours.state_dict()
    assert set(mine) == set(state)
    for key in state:
        assert torch.equal(mine[key].reshape(-1).view(torch.uint8), state[key].reshape(-1).view(torch.uint8)), key


@every_4bit
def test_their_state_dict_loads_strictly_into_our_layer(quant_type: str, double_quant: bool) -> None:
    theirs = linear_4bit(quant_type, double_quant)
    ours = QuantLinear(K, N, spec=fl.QuantSpec(quant_type, 64, double_quant))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, K)
    assert close(ours(x), theirs(x), x, ours.dequantize())


@every_4bit
def test_our_layer_becomes_theirs_with_the_same_outputs(quant_type: str, double_quant: bool) -> None:
    ours = QuantLinear.from_linear(nn.Linear(K, N), fl.QuantSpec(quant_type, 64, double_quant))
    theirs = bnb.nn.Linear4bit(K, N, compute_dtype=torch.float32)
    weight, stats = prequantized(ours)
    theirs.weight = bnb.nn.Params4bit.from_prequantized(weight, stats, device="cpu", module=theirs)
    theirs.bias = ours.bias
    x = torch.randn(5, K)
    assert close(ours(x), theirs(x), x, ours.dequantize())
    assert set(theirs.state_dict()) == set(ours.state_dict())


def test_an_8bit_layer_of_theirs_becomes_ours_and_back() -> None:
    theirs = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")
    ours = layer_from_state({f"fc.{key}": value for key, value in theirs.state_dict().items()}, "fc.", torch.float16)
    assert (ours.spec, ours.compute_dtype) == (fl.QuantSpec("int8"), torch.float16)
    x = torch.randn(5, K)
    assert close(ours(x), theirs(x), x, ours.dequantize(torch.float32))
    back = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")
    back.load_state_dict(ours.state_dict())
    assert close(ours(x), back(x), x, ours.dequantize(torch.float32))


def test_mode_and_frozen_bias_are_kept() -> None:
    theirs = linear_4bit("nf4", True).eval()
    theirs.bias.requires_grad_(False)
    ours = layer_from_module(theirs)
    assert not ours.training
    assert not ours.bias.requires_grad


def test_a_layer_that_is_not_quantized_yet_is_refused() -> None:
    with pytest.raises(fl.FormatError, match="weight is not a quantized weight"):
        layer_from_module(bnb.nn.Linear4bit(K, N))


def test_a_bias_that_does_not_fit_is_refused() -> None:
    state = linear_4bit("nf4", True).state_dict() | {"bias": torch.zeros(N + 1)}
    with pytest.raises(fl.FormatError, match=r"bias must be \[40\], not \[41\]"):
        layer_from_state(state)


def test_prequantized_is_for_4bit_weights() -> None:
    layer = QuantLinear.from_linear(nn.Linear(K, N), fl.QuantSpec("int8"))
    with pytest.raises(fl.UnsupportedError, match="nf4 and fp4 weights, not int8"):
        prequantized(layer)
