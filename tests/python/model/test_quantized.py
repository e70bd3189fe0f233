"""Adapters over packed bases: the same answers as over the decoded weight, and bytes that never change."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ferrolora as fl
from ferrolora.model.kbit import is_checkpointing
from ferrolora.nn import QuantLinear
from tiny import models
from tiny.models import logits

SPECS = [fl.QuantSpec("nf4"), fl.QuantSpec("fp4", double_quant=False), fl.QuantSpec("int8")]
# Float32 dot products of at most 48 terms of order 1, summed in two different orders, through two layers.
SUM_ORDER = {"atol": 1e-5, "rtol": 1e-5}


def decoded(model: nn.Module) -> nn.Module:
    """A copy with float layers that hold what the packed ones decode to: the plain torch twin."""
    twin = copy.deepcopy(model)
    for path, module in list(twin.named_modules()):
        if isinstance(module, QuantLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            dense.weight = nn.Parameter(module.dequantize(torch.float32))
            dense.bias = module.bias
            parent, _, leaf = path.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, dense)
    return twin


def packed_bytes(model: nn.Module) -> list[torch.Tensor]:
    return [m.weight.detach().clone() for m in model.modules() if isinstance(m, QuantLinear)]


def config(**options: object) -> fl.LoraConfig:
    return fl.LoraConfig(**({"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]} | options))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.quant_type)
def test_logits_and_gradients_equal_those_over_the_decoded_weight(spec: fl.QuantSpec) -> None:
    packed = fl.quantize_model(models.llama(), spec)
    twin = decoded(packed)
    results = []
    for base in (packed, twin):
        torch.manual_seed(1)
        model = fl.get_peft_model(base, config())
        answer = model(input_ids=models.token_ids(), labels=models.token_ids())
        answer.loss.backward()
        results.append([answer.logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(results[0]) == 1 + 2 * 4
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, **SUM_ORDER)


def test_an_adapter_trained_over_a_packed_base_is_a_file_for_any_base(tmp_path: Path) -> None:
    model = fl.get_peft_model(fl.quantize_model(models.llama()), config())
    model.save_pretrained(tmp_path)
    twin = fl.PeftModel.from_pretrained(decoded(model.unload()), tmp_path)
    again = fl.PeftModel.from_pretrained(model.get_base_model(), tmp_path)
    torch.testing.assert_close(logits(twin), logits(again), **SUM_ORDER)


def test_two_active_adapters_add_up_over_a_packed_base() -> None:
    packed = fl.quantize_model(models.llama())
    answers = []
    for base in (decoded(packed), packed):
        torch.manual_seed(1)
        model = fl.get_peft_model(base, config())
        model.add_adapter("second", config())
        model.set_adapter(["default", "second"])
        answers.append(logits(model))
    torch.testing.assert_close(*answers, **SUM_ORDER)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.quant_type)
def test_merge_and_unmerge_leave_the_packed_bytes_and_the_answers_as_they_were(spec: fl.QuantSpec) -> None:
    model = fl.get_peft_model(fl.quantize_model(models.llama(), spec), config())
    model.add_adapter("second", config())
    model.set_adapter(["default", "second"])
    before, codes = logits(model), packed_bytes(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, **SUM_ORDER)
    assert all(torch.equal(a, b) for a, b in zip(packed_bytes(model), codes, strict=True))
    with torch.no_grad():  # a merge is a snapshot: what the adapters become later is not in it
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    torch.testing.assert_close(logits(model), before, **SUM_ORDER)
    model.unmerge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(packed_bytes(model), codes, strict=True))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(model.get_base_model()))


def test_merge_and_unload_gives_a_dense_model_in_float32_when_asked() -> None:
    model = fl.get_peft_model(fl.quantize_model(models.llama()), config())
    before = logits(model)
    merged = model.merge_and_unload(dtype=torch.float32)
    assert not any(isinstance(module, QuantLinear) for module in merged.modules())
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged), before, **SUM_ORDER)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_and_unload_gives_16_bits_by_default(dtype: torch.dtype) -> None:
    model = fl.get_peft_model(fl.quantize_model(models.llama().to(dtype)), config())
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    expected = layer.base_layer.dequantize(torch.float32) + layer.delta_weight("default")
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert torch.equal(merged.model.layers[0].self_attn.q_proj.weight, expected.to(dtype))
    assert logits(merged).dtype == dtype


def test_a_packed_model_that_computes_in_float32_is_merged_to_bfloat16() -> None:
    merged = fl.get_peft_model(fl.quantize_model(models.llama()), config()).merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert logits(merged).dtype == torch.bfloat16


def test_unload_gives_back_the_packed_model() -> None:
    packed = fl.quantize_model(models.llama())
    expected = logits(packed)
    assert torch.equal(logits(fl.get_peft_model(packed, config()).unload()), expected)


def test_a_packed_weight_counts_the_parameters_it_stands_for() -> None:
    float_counts = fl.get_peft_model(models.llama(), config()).get_nb_trainable_parameters()
    packed = fl.get_peft_model(fl.quantize_model(models.llama()), config())
    assert packed.get_nb_trainable_parameters() == float_counts


def test_a_quantized_head_cannot_be_trained_in_full() -> None:
    base = fl.quantize_model(models.bert_classifier())
    base.classifier = QuantLinear.from_linear(base.classifier)
    with pytest.raises(fl.UnsupportedError, match="skip_modules"):
        fl.get_peft_model(base, fl.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))


def test_dropout_of_the_fused_path_follows_the_seed() -> None:
    model = fl.get_peft_model(fl.quantize_model(models.llama()), config(lora_dropout=0.5)).train()
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(model(input_ids=models.token_ids()).logits.detach())
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])


def test_training_a_packed_model_lowers_the_loss_and_leaves_its_bytes() -> None:
    base = fl.prepare_model_for_kbit_training(fl.quantize_model(models.llama()))
    model = fl.get_peft_model(base, fl.LoraConfig(r=4)).train()
    codes = packed_bytes(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(input_ids=models.token_ids(), labels=models.token_ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(a, b) for a, b in zip(packed_bytes(model), codes, strict=True))


# -- quantize_model and prepare_model_for_kbit_training ----------------------------------------------------------------


def kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {path: type(module) for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_every_linear_but_the_head_is_quantized() -> None:
    found = kinds(fl.quantize_model(models.llama()))
    assert found.pop("lm_head") is nn.Linear
    assert set(found.values()) == {QuantLinear}
    assert len(found) == 14


def test_task_heads_and_skipped_modules_stay_float() -> None:
    found = kinds(fl.quantize_model(models.bert_classifier(), skip_modules=["pooler", "layer.0.attention"]))
    floats = {path for path, kind in found.items() if kind is nn.Linear}
    attention = "bert.encoder.layer.0.attention"
    parts = ("self.query", "self.key", "self.value", "output.dense")
    assert floats == {"classifier", "bert.pooler.dense", *(f"{attention}.{part}" for part in parts)}


def test_a_tied_weight_stays_float() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 64)
            self.middle = nn.Linear(64, 64)
            self.decoder = nn.Linear(64, 8, bias=False)
            self.decoder.weight = self.embedding.weight

    assert kinds(fl.quantize_model(Tied())) == {"middle": QuantLinear, "decoder": nn.Linear}


def test_conv1d_is_refused_unless_it_is_skipped_by_name() -> None:
    with pytest.raises(fl.UnsupportedError, match=r"h\.0\.attn\.c_attn is a Conv1D.*skip_modules"):
        fl.quantize_model(models.gpt2())


def test_a_model_without_anything_to_quantize_is_refused() -> None:
    with pytest.raises(fl.TargetError, match=r"found no float nn\.Linear"):
        fl.quantize_model(nn.Embedding(4, 4))


def test_a_model_with_adapters_is_refused() -> None:
    with pytest.raises(fl.TargetError, match="before adding adapters"):
        fl.quantize_model(fl.get_peft_model(models.llama(), config()))


def test_a_weight_that_holds_nan_is_refused_by_its_name() -> None:
    model = models.llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 3] = torch.nan
    with pytest.raises(fl.QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        fl.quantize_model(model)


def test_preparing_freezes_everything_and_casts_nothing() -> None:
    model = fl.quantize_model(models.llama().to(torch.bfloat16))
    before = {name: p.dtype for name, p in model.named_parameters()}
    memory = sum(p.nbytes for p in model.parameters())
    fl.prepare_model_for_kbit_training(model)
    assert {name: p.dtype for name, p in model.named_parameters()} == before
    assert sum(p.nbytes for p in model.parameters()) == memory
    assert not any(p.requires_grad for p in model.parameters())
    assert is_checkpointing(model)


def test_preparing_without_checkpointing_leaves_it_off() -> None:
    model = fl.prepare_model_for_kbit_training(models.llama(), use_gradient_checkpointing=False)
    assert not is_checkpointing(model)


def test_checkpointing_gives_the_same_gradients_over_a_packed_base_with_dropout() -> None:
    packed = fl.quantize_model(models.llama())
    grads = []
    for checkpointed in (False, True):
        base = fl.prepare_model_for_kbit_training(copy.deepcopy(packed), use_gradient_checkpointing=checkpointed)
        torch.manual_seed(1)
        model = fl.get_peft_model(base, config(lora_dropout=0.3)).train()
        torch.manual_seed(2)
        model(input_ids=models.token_ids(), labels=models.token_ids()).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_bias_of_b_is_kept_beside_a_packed_base() -> None:
    layer_model = fl.quantize_model(nn.Sequential(nn.Linear(64, 32)))
    model = fl.get_peft_model(layer_model, fl.LoraConfig(target_modules=["0"], lora_bias=True, init_lora_weights=False))
    x = torch.randn(3, 64)
    layer = model.get_base_model()[0]
    b = layer.lora_B["default"]
    expected = F.linear(x, layer.base_layer.dequantize(torch.float32), layer.bias) + layer.scaling["default"] * b(
        layer.lora_A["default"](x)
    )
    torch.testing.assert_close(model(x), expected, **SUM_ORDER)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, **SUM_ORDER)
