"""LoRA on fused experts: against a float64 twin, against PEFT and its files, over float and packed weights."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ferrolora as fl
from ferrolora.adapters.lora_experts import LoraExperts, wrap_parameters
from ferrolora.errors import FormatError, TargetError, UnsupportedError
from ferrolora.nn.experts import PROJECTIONS
from tiny.experts import Branch, assert_within, experts_twin
from tiny.models import llama, logits, mixtral, qwen3_moe, token_ids

# PEFT's own, as it wraps a model of this transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SPECS = {"float": None, "nf4": fl.QuantSpec(), "int8": fl.QuantSpec("int8")}


def base(spec: fl.QuantSpec | None = None) -> nn.Module:
    torch.manual_seed(1)
    model = qwen3_moe()
    return model if spec is None else fl.quantize_model(model, spec)


def lora(**fields: object) -> fl.LoraConfig:
    return fl.LoraConfig(**({"r": 3, "lora_alpha": 6, "target_parameters": BOTH} | fields))


def randomise(model: nn.Module) -> None:
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter.data, std=0.2)


def adapted(spec: fl.QuantSpec | None = None, **fields: object) -> fl.PeftModel:
    model = fl.get_peft_model(base(spec), lora(**fields))
    randomise(model)
    return model


def per_expert(layer: LoraExperts) -> Branch:
    """PEFT's layout taken apart by its definition: `einsum("o r e, e r i -> e o i")`."""
    a, b = layer.factors("default")
    a = a.detach().reshape(layer.num_experts, -1, layer.in_features)
    return Branch(a, b.detach().reshape(layer.out_features, -1, layer.num_experts).permute(2, 0, 1), 2.0)


def in_file_layout(twin: dict, key: str) -> tuple[Tensor, Tensor]:
    """Gradients `[E, r, in]` or `[E, out, r]` and their bounds as they stand in the parameters."""
    if key[0] == "a":
        return type(twin[key])(*(part.flatten(0, 1) for part in twin[key]))
    return type(twin[key])(*(part.permute(1, 2, 0).flatten(1) for part in twin[key]))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_all_gradients_are_those_of_the_formula_within_rounding(spec, dtype) -> None:
    experts = base(spec).model.layers[0].mlp.experts.requires_grad_(False)
    if spec is None:
        experts = experts.to(dtype)
        weights = [experts.get_parameter(name).detach() for name in PROJECTIONS]
    else:
        weights = [experts.dequantize(name, torch.float32) for name in PROJECTIONS]
    layers = wrap_parameters(experts, PROJECTIONS, "experts")
    outer = layers["down_proj"]
    for name, layer in layers.items():
        layer.add_adapter("default", lora(), f"experts.{name}", True)
        layer.activate(["default"], True)
    randomise(outer)
    x, index = torch.randn(9, 36).to(dtype).requires_grad_(), torch.randint(0, 4, (9, 2))  # experts 4 and 5 rest
    routing, d_out = torch.rand(9, 2).to(dtype).requires_grad_(), torch.randn(9, 36).to(dtype)
    y = outer(x, index, routing)
    y.backward(d_out)
    branches = [per_expert(layers[name]) for name in PROJECTIONS]
    twin = experts_twin(x.detach(), index, routing.detach(), d_out, weights, branches)
    for found, name in ((y, "y"), (x.grad, "x"), (routing.grad, "w")):
        assert_within(found, twin[name])
    for i, name in enumerate(PROJECTIONS):
        layer = layers[name]
        assert_within(layer.lora_A["default"].weight.grad, in_file_layout(twin, f"a{i}"))
        assert_within(layer.lora_B["default"].weight.grad, in_file_layout(twin, f"b{i}"))
        assert not layer.lora_A["default"].weight.grad.view(6, 3, -1)[4:].any()


def test_the_branch_of_an_expert_that_no_token_goes_to_is_not_computed() -> None:
    experts = base(fl.QuantSpec(double_quant=False)).model.layers[0].mlp.experts
    layer = wrap_parameters(experts, ["gate_up_proj"], "experts")["gate_up_proj"]
    layer.add_adapter("default", lora(), "experts.gate_up_proj", True)
    layer.activate(["default"], True)
    layer.lora_A["default"].weight.data.view(6, 3, -1)[5] = torch.nan
    experts.gate_up_proj_absmax[5] = torch.nan
    x = torch.randn(4, 36)
    assert layer(x, torch.randint(0, 5, (4, 2)), torch.rand(4, 2)).isfinite().all()
    assert layer(x, torch.full((4, 2), 5), torch.rand(4, 2)).isnan().all()


def close(found: Tensor, expected: Tensor) -> None:
    """PEFT adds s·B·A to W first: sums in another order, at most 2·(K + r + 6)·2^-24 of |x|·(|W| + |s·B·A|) a product.

    Through two layers of width 36 with values of order 1 that stays below 1e-5.
    """
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")  # PEFT applies it
@pytest.mark.parametrize("targets", [BOTH, BOTH[1:]], ids=["both", "one"])
@pytest.mark.parametrize("modules", [None, ["q_proj", "v_proj"]], ids=["experts alone", "with attention"])
def test_peft_loads_our_file_and_computes_the_same(tmp_path: Path, targets, modules) -> None:
    ours = adapted(target_parameters=targets, target_modules=modules, rank_pattern={"experts.down_proj": 2})
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    close(logits(ours), logits(theirs))
    assert not torch.allclose(logits(ours), logits(base()), atol=1e-3)


@pytest.mark.parametrize("make", [qwen3_moe, mixtral], ids=["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("modules", [None, ["q_proj", "v_proj"]], ids=["experts alone", "with attention"])
def test_we_load_pefts_file_and_compute_the_same(tmp_path: Path, make, modules) -> None:
    torch.manual_seed(1)
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=modules, target_parameters=BOTH))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.manual_seed(1)
    ours = fl.PeftModel.from_pretrained(make(), tmp_path / "theirs")
    close(logits(ours), logits(theirs))
    ours.save_pretrained(tmp_path / "ours")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    before, after = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    assert sorted(before["target_parameters"]) == sorted(after["target_parameters"])
    assert sorted(before["target_modules"]) == sorted(after["target_modules"])


def test_pefts_own_target_parameters_over_packed_experts_are_refused_with_the_mend() -> None:
    model = peft.get_peft_model(base(fl.QuantSpec()), peft.LoraConfig(target_modules=[], target_parameters=BOTH))
    with pytest.raises(UnsupportedError, match=r"gate_up_proj.*LoraConfig\(target_parameters"):
        logits(model)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_it_trains_and_saves_and_comes_back_with_the_same_bits(tmp_path: Path, spec) -> None:
    model = fl.get_peft_model(base(spec), lora(target_modules=["q_proj"]))
    close(logits(model), logits(base(spec)))  # B starts at zero
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model.train()(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    model.save_pretrained(tmp_path)
    again = fl.PeftModel.from_pretrained(base(spec), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1]], ids=["both", "one"])
def test_merge_and_unload_gives_float_experts_that_compute_the_same(spec, targets) -> None:
    model = adapted(spec, target_parameters=targets, target_modules=["q_proj"])
    before = logits(model)
    plain = fl.get_peft_model(base(spec), lora(target_parameters=targets)).unload()
    assert torch.equal(logits(plain), logits(base(spec)))
    merged = model.merge_and_unload(dtype=torch.float32)
    experts = merged.model.layers[0].mlp.experts
    assert type(experts) is type(base().model.layers[0].mlp.experts)
    assert all(parameter.dtype == torch.float32 for parameter in merged.parameters())
    close(logits(merged), before)


def test_a_merge_rounds_once_and_bfloat16_is_the_default_over_packed_experts() -> None:
    model = adapted(fl.QuantSpec())
    layer = model.base_model.model.model.layers[1].mlp.experts
    wide = {name: one.weight_with(["default"], one.float_weight()) for name, one in layer.chain().items()}
    merged = model.merge_and_unload().model.layers[1].mlp.experts
    for name, weight in wide.items():
        assert torch.equal(merged.get_parameter(name), weight.to(torch.bfloat16))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_merge_adapter_is_undone_exactly_and_disabling_gives_the_base(spec) -> None:
    model = adapted(spec)
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base(spec)))
    model.merge_adapter()
    close(logits(model), before)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_two_adapters_add_up_and_are_deleted() -> None:
    model = adapted(fl.QuantSpec())
    first = logits(model)
    model.add_adapter("b", lora(r=2))
    randomise(model)
    model.set_adapter(["default", "b"])
    both = logits(model)
    close(logits(model.merge_and_unload(dtype=torch.float32)), both)
    assert not torch.equal(both, first)


def test_starts_parameters_and_targets() -> None:
    torch.manual_seed(0)
    model = fl.get_peft_model(base(fl.QuantSpec()), lora(init_lora_weights="gaussian", r=8))
    layer = model.base_model.model.model.layers[0].mlp.experts
    assert layer.lora_A["default"].weight.shape == (6 * 8, 20)
    # 1/r, not 1/(r·E); the deviation of 960 draws is off by 10 % once in 10^5
    assert 0.9 / 8 < layer.lora_A["default"].weight.std().item() < 1.1 / 8
    trainable, total = model.get_nb_trainable_parameters()
    added = 2 * 6 * 8 * (36 + 40 + 20 + 36)
    assert trainable == added
    assert total == added + sum(parameter.numel() for parameter in base().parameters())
    assert model.peft_config["default"].target_modules == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"target_parameters": "experts.down_proj"}, "list of names"),
    ],
)
def test_what_peft_refuses_on_parameters_is_refused(fields, message) -> None:
    with pytest.raises(UnsupportedError, match=message):
        lora(**fields)


def test_errors_name_what_is_wrong_and_the_mend(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"experts\.up.*it has experts\.down_proj, experts\.gate_up_proj"):
        fl.get_peft_model(base(), lora(target_parameters=["experts.up"]))
    with pytest.raises(TargetError, match="no fused experts"):
        fl.get_peft_model(llama(), lora())
    with pytest.raises(UnsupportedError, match=r"q_proj\.weight belongs to a Linear.*target_modules"):
        fl.get_peft_model(base(), lora(target_parameters=["q_proj.weight"]))
    with pytest.raises(UnsupportedError, match="only LoraConfig"):
        fl.AdaLoraConfig(target_parameters=BOTH, total_step=10)
    model = adapted()
    with pytest.raises(UnsupportedError, match="same target_parameters"):
        model.add_adapter("b", lora(target_parameters=BOTH[:1]))
    with pytest.raises(UnsupportedError, match="cannot mix adapters"):
        model(input_ids=token_ids(), adapter_names=["default", "__base__"])
    with pytest.raises(UnsupportedError, match="target_parameters"):
        model.add_weighted_adapter(["default"], [1.0], "c")
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="target_parameters"):
        model.hotswap_adapter(tmp_path)
    with pytest.raises(FormatError, match="lacks"):
        load_without_inner(tmp_path)


def load_without_inner(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if ".base_layer." not in key}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fl.PeftModel.from_pretrained(base(), folder)
