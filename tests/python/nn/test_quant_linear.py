"""QuantLinear as a torch module: state dict, copies, moves, meta device, gradients."""

import copy
import io
import itertools
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

import ferrolora as fl
from ferrolora.nn import QuantLinear

SPECS = [
    fl.QuantSpec("nf4"),
    fl.QuantSpec("nf4", 128, double_quant=False),
    fl.QuantSpec("fp4"),
    fl.QuantSpec("int8"),
]
KEYS = {
    SPECS[0]: ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"],
    SPECS[1]: ["", ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"],
    SPECS[2]: ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__fp4"],
}
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.quant_type}-{s.block_size}-{s.double_quant}")


def make(spec: fl.QuantSpec = SPECS[0], k: int = 101, n: int = 33, dtype: torch.dtype = torch.float32) -> QuantLinear:
    return QuantLinear.from_linear(nn.Linear(k, n, dtype=dtype), spec)


def same(a: nn.Module, b: nn.Module) -> bool:
    """Same outputs and same state, bit for bit."""
    x = torch.randn(3, 101)
    one, two = a.state_dict(), b.state_dict()
    return torch.equal(a(x), b(x)) and list(one) == list(two) and all(torch.equal(one[key], two[key]) for key in one)


@every_spec
def test_the_layer_computes_with_the_decoded_weight(spec: fl.QuantSpec) -> None:
    linear = nn.Linear(101, 33)
    layer = QuantLinear.from_linear(linear, spec)
    x = torch.randn(2, 5, 101)
    expected = nn.functional.linear(x, layer.dequantize(), linear.bias)
    # Two float32 sums of 101 products, each within 101·2⁻²⁴ of the sum of magnitudes, and a few roundings.
    bound = 2 * 110 * 2.0**-24 * nn.functional.linear(x.abs(), layer.dequantize().abs(), linear.bias.abs())
    assert bool(((layer(x) - expected).abs() <= bound).all())
    assert layer.bias is linear.bias


def test_the_weight_is_a_frozen_parameter_and_the_scales_are_buffers() -> None:
    layer = make()
    assert isinstance(layer, nn.Linear)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert [name for name, _ in layer.named_buffers()] == ["weight_absmax", "weight_nested_absmax", "weight_offset"]
    assert layer.W_q is layer.codes is dict(layer.named_parameters())["weight"]
    assert not layer.weight.requires_grad
    assert (layer.in_features, layer.out_features, layer.compute_dtype) == (101, 33, torch.float32)
    with pytest.raises(RuntimeError, match="floating point"):
        layer.weight.requires_grad_(True)


@every_spec
def test_the_state_dict_has_exactly_the_published_keys(spec: fl.QuantSpec) -> None:
    state = nn.Sequential(OrderedDict(fc=make(spec))).state_dict()
    names = [f"weight{key}" for key in KEYS[spec]] if spec in KEYS else ["weight", "SCB", "weight_format"]
    assert list(state) == [f"fc.{name}" for name in [*names, "bias"]]


@every_spec
@pytest.mark.parametrize(("assign", "device"), [(False, "cpu"), (True, "cpu"), (True, "meta")])
def test_a_state_dict_loads_strictly_into_a_fresh_layer(spec: fl.QuantSpec, assign: bool, device: str) -> None:
    model = nn.Sequential(nn.ReLU(), make(spec))
    fresh = nn.Sequential(nn.ReLU(), QuantLinear(101, 33, spec=spec, device=device))
    result = fresh.load_state_dict(model.state_dict(), assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert same(model, fresh)


def test_assign_takes_the_recorded_type_and_copy_keeps_the_layers_own() -> None:
    for assign, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        layer = QuantLinear(101, 33)
        layer.load_state_dict(make(dtype=torch.bfloat16).state_dict(), assign=assign)
        assert (layer.compute_dtype, layer.bias.dtype, layer.dequantize().dtype) == (dtype, dtype, dtype)


def test_missing_and_unexpected_keys_are_reported_by_their_names_in_the_file() -> None:
    model = nn.Sequential(OrderedDict(fc=make()))
    state = model.state_dict()
    del state["fc.weight.absmax"], state["fc.bias"]
    state["fc.weight.extra"] = state["fc.weight_absmax"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"fc\.weight\.absmax") as caught:
        model.load_state_dict(state)
    assert "weight_nested_absmax" not in str(caught.value)
    result = model.load_state_dict(state, strict=False)
    assert sorted(result.missing_keys) == ["fc.bias", "fc.weight.absmax"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fc\.weight\.extra.*fc\.weight_absmax"):
        model.load_state_dict(state)


def test_a_float_state_dict_is_refused_with_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.absmax"):
        make().load_state_dict(nn.Linear(101, 33).state_dict())


def test_a_bias_for_a_layer_without_one_is_unexpected() -> None:
    state = make().state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        QuantLinear(101, 33, bias=False).load_state_dict(state)


@pytest.mark.parametrize(("saved", "built"), list(itertools.permutations(SPECS, 2)))
def test_another_codec_is_refused_with_both_named(saved: fl.QuantSpec, built: fl.QuantSpec) -> None:
    with pytest.raises(fl.FormatError, match=f"saved with .*{saved.quant_type}.* built with .*{built.quant_type}"):
        QuantLinear(101, 33, spec=built).load_state_dict(make(saved).state_dict())


def test_another_shape_is_refused() -> None:
    with pytest.raises(fl.FormatError, match=r"\[33, 101\] in the state dict; the layer is \[101, 33\]"):
        QuantLinear(33, 101).load_state_dict(make().state_dict())


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
def test_the_weight_may_be_stored_as_the_bytes_of_a_float_type(storage: torch.dtype) -> None:
    layer = make(k=64)
    for assign in (False, True):
        state = layer.state_dict()
        state["weight"] = state["weight"].view(-1).view(storage).unsqueeze(1)
        fresh = QuantLinear(64, 33)
        fresh.load_state_dict(state, assign=assign)
        assert torch.equal(fresh.weight, layer.weight)


@every_spec
def test_deepcopy_pickle_and_save_keep_every_bit(spec: fl.QuantSpec) -> None:
    layer = make(spec)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert same(layer, twin)
        assert twin.spec == spec
        assert twin.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_spec
def test_a_change_of_type_changes_bias_and_compute_dtype_only(spec: fl.QuantSpec, dtype: torch.dtype) -> None:
    layer = make(spec)
    before = layer.dequantize(torch.float32)
    scales = {name: buffer.dtype for name, buffer in layer.named_buffers()}
    nn.Sequential(layer).to(dtype)
    assert (layer.bias.dtype, layer.compute_dtype, layer.dequantize().dtype) == (dtype, dtype, dtype)
    assert {name: buffer.dtype for name, buffer in layer.named_buffers()} == scales
    assert torch.equal(layer.dequantize(torch.float32), before)
    assert layer(torch.randn(3, 101).to(dtype)).dtype == dtype


def test_a_layer_goes_to_meta_and_comes_back_empty() -> None:
    layer = make().to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    with pytest.raises(fl.UnsupportedError, match="meta"):
        layer(torch.randn(1, 101))
    layer.to_empty(device="cpu")
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"cpu"}
    whole = make()
    layer.load_state_dict(whole.state_dict())
    assert same(layer, whole)


def test_a_layer_can_be_shared_between_processes() -> None:
    layer = make()
    x = torch.randn(3, 101)
    before = layer(x)
    layer.share_memory()
    assert all(tensor.is_shared() for tensor in (*layer.parameters(), *layer.buffers()))
    assert torch.equal(layer(x), before)


def test_a_failed_move_leaves_the_scales_in_place() -> None:
    layer = make()

    def fail(tensor: Tensor) -> Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        layer._apply(fail)
    assert layer.weight_absmax is not None
    assert layer(torch.randn(1, 101)).shape == (1, 33)


def test_training_gives_the_bias_and_the_input_gradients() -> None:
    layer = make().train()
    x = torch.randn(4, 101, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert layer.bias.grad is not None
    assert layer.weight.grad is None


def test_the_fused_call_equals_the_function() -> None:
    layer = make()
    x, lora = torch.randn(4, 101), fl.LowRank(torch.randn(4, 101), torch.randn(33, 4), 2.0)
    expected = fl.linear(x, layer.quant_tensor(), layer.bias, lora)
    assert torch.equal(layer.forward_with_low_rank(x, lora), expected)


def test_a_weight_that_is_not_finite_is_refused_by_name() -> None:
    linear = nn.Linear(64, 8)
    linear.weight.data[2, 3] = torch.nan
    with pytest.raises(fl.QuantizationError, match=r"h\.0\.mlp"):
        QuantLinear.from_linear(linear, name="h.0.mlp")


def test_from_quant_tensor_shares_the_tensors_and_wants_a_matrix() -> None:
    qt = fl.quantize(torch.randn(8, 64))
    layer = QuantLinear.from_quant_tensor(qt)
    assert layer.weight.data_ptr() == qt.codes.data_ptr()
    assert layer.bias is None
    with pytest.raises(fl.ShapeError, match=r"needs a weight \[N, K\], not \[64\]"):
        QuantLinear.from_quant_tensor(fl.quantize(torch.randn(64)))


def test_the_mode_of_the_float_layer_is_kept() -> None:
    assert not QuantLinear.from_linear(nn.Linear(64, 8).eval()).training


def test_resetting_parameters_leaves_the_packed_weight_alone() -> None:
    layer = make()
    before = layer.weight.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight, before)


def test_the_representation_names_the_codec() -> None:
    assert "nf4, block_size=64, double_quant=True, compute_dtype=torch.float32" in repr(make())
    assert "bias=True, int8, compute_dtype" in repr(make(SPECS[3]))
