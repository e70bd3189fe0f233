"""The initializers: what they promise about the weight they start from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ferrolora as fl
from ferrolora.adapters.init.eva import InputDirections
from ferrolora.adapters.lora import LoraLinear
from ferrolora.nn import QuantLinear
from tiny import folders, models
from tiny.methods import float_weights


def started(base: nn.Module, init: Any, source: Any = None, **options: Any) -> LoraLinear:
    layer = LoraLinear(base)
    layer.add_adapter("a", fl.LoraConfig(init_lora_weights=init, **options), "layer", True, source)
    layer.activate(["a"], True)
    return layer


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
def test_the_start_takes_out_of_the_base_what_it_puts_into_the_adapter(init: str) -> None:
    linear = nn.Linear(48, 32)
    weight, x = linear.weight.detach().clone(), torch.randn(5, 48)
    before = linear(x).detach()
    layer = started(linear, init, r=6, lora_alpha=9)
    # W = (W − sBA) + sBA: a few roundings of values of order 1
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=0)
    assert not torch.equal(layer.base_layer.weight, weight)


def test_pissa_holds_the_principal_part() -> None:
    linear = nn.Linear(48, 32, bias=False)
    values = torch.linalg.svdvals(linear.weight.detach())
    layer = started(linear, "pissa", r=6, lora_alpha=9)
    # the base is left with the other singular values
    torch.testing.assert_close(
        torch.linalg.svdvals(layer.base_layer.weight.detach())[:26], values[6:], atol=1e-5, rtol=0
    )


def test_olora_starts_with_orthonormal_columns() -> None:
    layer = started(nn.Linear(48, 32), "olora", r=6)
    b = layer.factors("a")[1]
    torch.testing.assert_close(b.T @ b, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("spec", [fl.QuantSpec("nf4"), fl.QuantSpec("fp4"), fl.QuantSpec("int8")])
def test_loftq_shrinks_the_error_of_the_quantized_layer_and_keeps_its_bytes(spec: fl.QuantSpec) -> None:
    weight = torch.randn(64, 128) / 8
    linear = nn.Linear(128, 64, bias=False)
    linear.weight.data = weight.clone()
    packed = QuantLinear.from_linear(linear, spec)
    codes = packed.weight.clone()
    layer = started(packed, "loftq", source=lambda: weight, r=16, lora_alpha=4)
    plain = (packed.dequantize(torch.float32) - weight).norm()
    corrected = layer.float_weight() + layer.delta_weight("a") - weight
    # the best rank-16 part of a 64 x 128 error; at least the share 16/64 of its energy
    assert corrected.norm() < plain * (1 - 16 / 64) ** 0.5
    assert torch.equal(layer.base_layer.weight, codes)


def test_more_iterations_of_loftq_come_closer() -> None:
    weight = torch.randn(64, 128) / 8
    errors = []
    for iterations in (1, 4):
        linear = nn.Linear(128, 64, bias=False)
        linear.weight.data = weight.clone()
        packed = QuantLinear.from_linear(linear)
        options = {"loftq_bits": 4, "loftq_iter": iterations}
        layer = started(packed, "loftq", source=lambda: weight, r=16, loftq_config=options)
        errors.append((layer.float_weight() + layer.delta_weight("a") - weight).norm())
    assert errors[1] < errors[0]


def test_over_a_packed_model_the_float_weights_come_from_its_checkpoint(tmp_path: Path) -> None:
    folders.save(models.llama(), tmp_path, shard_size="20KB")
    from transformers import AutoModelForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fl.FerroloraConfig("nf4"))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = fl.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", r=8)
    distances = []
    for init in (True, "pissa"):
        config.init_lora_weights = init
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fl.FerroloraConfig("nf4"))
        model = fl.get_peft_model(base, config)
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
        start = layer.float_weight() + layer.delta_weight("default")
        distances.append((start - dense.model.layers[0].self_attn.q_proj.weight).norm())
    assert distances[1] < distances[0]  # the residual of PiSSA has smaller scales, so 4 bits hold it better
    assert packed is not None


def test_without_the_float_weights_it_says_where_to_give_them() -> None:
    model = fl.quantize_model(models.llama())
    with pytest.raises(fl.FormatError, match=r"float_weights="):
        fl.get_peft_model(model, fl.LoraConfig(init_lora_weights="pissa"))
    with pytest.raises(fl.FormatError, match=r"holds no .*q_proj"):
        fl.get_peft_model(
            fl.quantize_model(models.llama()),
            fl.LoraConfig(init_lora_weights="pissa"),
            float_weights={"x": torch.ones(1)},
        )


def test_pissa_over_a_packed_base_is_loaded_again_with_the_same_logits(tmp_path: Path) -> None:
    dense = models.llama()
    weights = float_weights(dense)
    torch.manual_seed(0)
    model = fl.get_peft_model(
        fl.quantize_model(models.llama()), fl.LoraConfig(init_lora_weights="pissa", r=4), float_weights=weights
    )
    assert model.peft_config["default"].init_lora_weights == "pissa"


def test_directions_of_a_stream_are_those_of_all_its_rows_at_once() -> None:
    rows = torch.randn(60, 10) * torch.linspace(3, 0.1, 10) + 2
    stream = InputDirections(10)
    for batch in rows.split(12):
        stream.update(batch)
    _, values, vectors = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert stream.values is not None
    assert stream.vectors is not None
    torch.testing.assert_close(stream.values, values, atol=1e-3, rtol=0)
    cosines = (stream.vectors * vectors).sum(1).abs()
    torch.testing.assert_close(cosines, torch.ones(10), atol=1e-3, rtol=0)
    torch.testing.assert_close(stream.explained().sum(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_eva_gives_the_ranks_to_the_layers_that_explain_most(packed: bool) -> None:
    base = fl.quantize_model(models.llama()) if packed else models.llama()
    config = fl.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="eva", eva_config={"rho": 2.0})
    model = fl.get_peft_model(base, config)
    ids = torch.randint(0, 6, (4, 8))  # few tokens: inputs of layers that see positions vary more than embeddings
    before = models.logits(model)
    fl.initialize_lora_eva_weights(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 3)
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    ranks = [layer.factors("default")[0].shape[0] for layer in layers]
    assert sum(ranks) == 14 * 4
    assert max(ranks) <= 8
    assert len(set(ranks)) > 1
    torch.testing.assert_close(models.logits(model), before, atol=1e-6, rtol=0)
    for layer in layers:
        a = layer.factors("default")[0]
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-4, rtol=0)
        assert layer.scaling["default"] == pytest.approx(8 / 4)


def test_eva_keeps_its_ranks_in_the_file(tmp_path: Path) -> None:
    config = fl.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="eva")
    torch.manual_seed(0)
    model = fl.get_peft_model(models.llama(), config)
    fl.initialize_lora_eva_weights(model, [{"input_ids": torch.randint(0, 64, (4, 8))}])
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = fl.PeftModel.from_pretrained(models.llama(), tmp_path)
    assert torch.equal(models.logits(again), models.logits(model))


def test_eva_needs_an_adapter_that_was_made_for_it() -> None:
    with pytest.raises(fl.UnsupportedError, match="init_lora_weights='eva'"):
        fl.initialize_lora_eva_weights(fl.get_peft_model(models.llama(), fl.LoraConfig()), [])
