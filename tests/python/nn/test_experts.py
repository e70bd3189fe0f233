"""QuantExperts against transformers' own experts over the decoded weights, and against float64 with derived bounds."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import ferrolora as fl
from ferrolora.errors import FormatError, QuantizationError, ShapeError, UnsupportedError
from ferrolora.nn import QuantExperts
from ferrolora.nn.experts import PROJECTIONS
from tiny.experts import assert_within, experts_twin

SPECS = {
    "nf4": fl.QuantSpec(),
    "nf4 plain scales": fl.QuantSpec("nf4", 128, double_quant=False),
    "fp4": fl.QuantSpec("fp4", 32),
    "int8": fl.QuantSpec("int8"),
}


def float_experts(hidden: int = 36, intermediate: int = 20, experts: int = 5) -> nn.Module:
    config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=experts)
    config._experts_implementation = "eager"
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def routed(tokens: int = 7, hidden: int = 36) -> tuple[Tensor, Tensor, Tensor]:
    """Two experts a token; no token goes to expert 3."""
    allowed = torch.tensor([0, 1, 2, 4])
    index = torch.stack([allowed[torch.randperm(4)[:2]] for _ in range(tokens)])
    return torch.randn(tokens, hidden), index, torch.rand(tokens, 2)


def matrices(experts: QuantExperts) -> list[Tensor]:
    return [experts.dequantize(name, torch.float32) for name in PROJECTIONS]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_those_of_the_formula_within_rounding(spec: fl.QuantSpec, dtype: torch.dtype) -> None:
    experts = QuantExperts.from_experts(float_experts(), spec)
    x, index, weights = routed()
    x, weights, d_out = x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_(), torch.randn(7, 36).to(dtype)
    y = experts(x, index, weights)
    y.backward(d_out)
    assert y.dtype == dtype
    twin = experts_twin(x.detach(), index, weights.detach(), d_out, matrices(experts))
    for found, name in ((y, "y"), (x.grad, "x"), (weights.grad, "w")):
        assert_within(found, twin[name])


def test_the_twin_is_the_models_own_eager_forward_and_its_gradient() -> None:
    experts = float_experts().double()
    x, index, weights = (t.double() if t.is_floating_point() else t for t in routed())
    d_out = torch.randn_like(x)
    x.requires_grad_(), weights.requires_grad_()
    y = experts(x, index, weights)
    y.backward(d_out)
    own = [experts.gate_up_proj.detach(), experts.down_proj.detach()]
    twin = experts_twin(x.detach().float(), index, weights.detach().float(), d_out.float(), own)
    for found, name in ((y, "y"), (x.grad, "x"), (weights.grad, "w")):
        assert_within(found, twin[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_three_of_transformers_forwards_over_the_decoded_weights_agree(dtype: torch.dtype) -> None:
    experts = QuantExperts.from_experts(float_experts().to(dtype))
    x, index, weights = routed()
    x, weights = x.to(dtype), weights.to(dtype)
    twin = experts_twin(x, index, weights, torch.zeros_like(x), matrices(experts))
    dense = experts.dense(torch.float32).to(dtype)
    assert type(dense) is MixtralExperts
    assert_within(experts(x, index, weights), twin["y"])
    if dtype == torch.float32:  # in 16 bits the decoded weight itself is rounded once more
        for name in ("eager", "batched_mm", "grouped_mm"):
            dense.config._experts_implementation = name
            assert_within(dense(x, index, weights), twin["y"])


def test_an_expert_that_no_token_goes_to_is_never_decoded() -> None:
    experts = QuantExperts.from_experts(float_experts(), fl.QuantSpec(double_quant=False))
    x, index, weights = routed()
    x.requires_grad_()
    clean = experts(x, index, weights)
    for projection in PROJECTIONS:
        experts.get_buffer(f"{projection}_absmax")[3] = torch.nan
    spoilt = experts(x, index, weights)
    assert torch.equal(spoilt, clean)
    spoilt.sum().backward()
    assert x.grad.isfinite().all()
    assert experts(x, torch.full_like(index, 3), weights).isnan().all()


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_each_expert_is_packed_as_if_it_were_alone(spec: fl.QuantSpec) -> None:
    module = float_experts()
    experts = QuantExperts.from_experts(module, spec)
    for projection in PROJECTIONS:
        for index, weight in enumerate(module.get_parameter(projection)):
            alone, packed = fl.quantize(weight, spec), experts.stack(projection).expert(index)
            assert packed.codes.data_ptr() == experts.get_parameter(projection)[index].data_ptr()
            for part in ("codes", "absmax", "nested_absmax", "offset"):
                one, other = getattr(alone, part), getattr(packed, part)
                assert (one is None and other is None) or torch.equal(one, other)


def test_an_expert_weight_takes_four_and_an_eighth_bits_and_its_share_of_the_nested_scales() -> None:
    experts = QuantExperts.from_experts(float_experts(hidden=128, intermediate=64, experts=3))
    for projection, (count, n, k) in experts.shapes.items():
        stack = experts.stack(projection)
        blocks = n * k / 64
        nested = -(-blocks // 256) * 32 + 32  # scales of the scales, and the mean that was taken off them
        assert stack.nbytes * 8 == count * (4 * n * k + 8 * blocks + nested)
        assert stack.nbytes * 8 / stack.numel() <= 4.14


def test_no_tokens_and_a_single_slot() -> None:
    experts = QuantExperts.from_experts(float_experts())
    empty = experts(torch.empty(0, 36), torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert empty.shape == (0, 36)
    x, index, weights = routed()
    assert experts(x, index[:, :1], weights[:, :1]).shape == x.shape


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_round_trip_is_exact_and_strict(spec: fl.QuantSpec, assign: bool) -> None:
    source = QuantExperts.from_experts(float_experts(), spec)
    other = QuantExperts.from_experts(float_experts(), spec)
    other.load_state_dict(source.state_dict(), assign=assign)
    x, index, weights = routed()
    assert torch.equal(other(x, index, weights), source(x, index, weights))
    state = source.state_dict()
    del state["down_proj_absmax"]
    with pytest.raises(RuntimeError, match="down_proj_absmax"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="surplus"):
        other.load_state_dict({**source.state_dict(), "surplus": torch.ones(1)})


def test_states_that_do_not_fit_are_refused_by_name() -> None:
    experts = QuantExperts.from_experts(float_experts())
    with pytest.raises(FormatError, match=r"gate_up_proj was saved as .*fp4"):
        experts.load_state_dict(QuantExperts.from_experts(float_experts(), fl.QuantSpec("fp4")).state_dict())
    state = experts.state_dict()
    with pytest.raises(FormatError, match="codes of nf4 experts"):
        experts.load_state_dict({**state, "gate_up_proj_codes": state["gate_up_proj_codes"][:, :-1]})
    with pytest.raises(FormatError, match="JSON"):
        experts.load_state_dict({**state, "gate_up_proj_header": torch.zeros(3, dtype=torch.uint8)})


def test_casts_and_copies_leave_the_scales_alone() -> None:
    experts = QuantExperts.from_experts(float_experts(), fl.QuantSpec(double_quant=False))
    cast = copy.deepcopy(experts).to(torch.bfloat16)
    assert cast.compute_dtype == torch.bfloat16
    for name, buffer in experts.named_buffers():
        assert torch.equal(cast.get_buffer(name), buffer)


def test_the_float_module_comes_back_with_its_class_and_the_decoded_values() -> None:
    experts = QuantExperts.from_experts(float_experts())
    dense = experts.dense()
    assert type(dense) is MixtralExperts
    for projection in PROJECTIONS:
        assert torch.equal(dense.get_parameter(projection), experts.dequantize(projection))


def test_what_cannot_be_packed_is_refused() -> None:
    config = GptOssConfig(hidden_size=32, intermediate_size=32, num_local_experts=2)
    with pytest.raises(UnsupportedError, match=r"mlp\.experts is a GptOssExperts .*skip_modules"):
        QuantExperts.from_experts(GptOssExperts(config), name="mlp.experts")
    broken = float_experts()
    broken.down_proj.data[2, 0, 0] = torch.nan
    with pytest.raises(QuantizationError, match=r"mlp\.experts\.down_proj\[2\]"):
        QuantExperts.from_experts(broken, name="mlp.experts")
    x, index, weights = routed()
    with pytest.raises(ShapeError, match="holds 9, but there are 5 experts"):
        QuantExperts.from_experts(float_experts())(x, index.fill_(9), weights)
