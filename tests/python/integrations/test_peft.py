"""PEFT's own methods over packed layers: the numbers of a float base with the decoded weights, and safe merging."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import ferrolora as fl
from ferrolora.integrations.peft import accelerate
from ferrolora.nn import QuantLinear
from tiny import models

TWO: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(r=4, **TWO),
    "rank-stabilised LoRA": lambda: peft.LoraConfig(r=4, use_rslora=True, **TWO),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **TWO),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, task_type="CAUSAL_LM", **TWO),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **TWO),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=8, **TWO),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}
VIRTUAL = {"prompt", "prefix"}
SPECS = [fl.QuantSpec("nf4"), fl.QuantSpec("int8")]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def packed(spec: fl.QuantSpec) -> nn.Module:
    torch.manual_seed(0)
    model = models.llama()
    fl.quantize_model(model, spec)
    return model


def decoded(model: nn.Module) -> nn.Module:
    """The same model with float layers that hold the decoded weights."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.dequantize())
            plain.set_submodule(name, linear)
    return plain


def adapted(base: nn.Module, method: str) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(base, METHODS[method]())
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def step(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    ids = models.token_ids()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_the_logits_and_gradients_of_the_decoded_weights(
    method: str, spec: fl.QuantSpec, fused: bool
) -> None:
    base = packed(spec)
    expected = step(adapted(decoded(base), method))
    model = adapted(base, method)
    if fused and method not in VIRTUAL:
        assert accelerate(model) == (2 if method == "VeRA" else 4)
    # float32 sums of at most 48 products of order 0.1, in another order, through two layers
    torch.testing.assert_close(step(model), expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in VIRTUAL])
def test_merging_gives_float_layers_with_the_same_answers_or_is_refused(method: str, spec: fl.QuantSpec) -> None:
    model = adapted(packed(spec), method)
    accelerate(model)
    before = models.logits(model)
    with pytest.raises(fl.UnsupportedError, match="packed weight"):
        model.merge_adapter()
    assert torch.equal(models.logits(model), before)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(merged.model.layers[0].self_attn.o_proj, QuantLinear)  # had no adapter
    # W + ΔW rounded once to float32, then the sums of the products in another order
    torch.testing.assert_close(models.logits(merged), before, atol=5e-6, rtol=0)


def test_merged_layers_of_gpt2_are_conv1d_again(tmp_path: Path) -> None:
    models.gpt2().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=fl.FerroloraConfig())
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["c_proj"], init_lora_weights=False))
    accelerate(model)
    expected = models.logits(model.eval())
    merged = model.merge_and_unload()
    layer = merged.transformer.h[0].attn.c_proj
    assert isinstance(layer, Conv1D)
    assert isinstance(merged.transformer.h[0].attn.c_attn, QuantLinear)
    # (W + Δ)x for Wx + Δx: float32 sums of 128 products in another order, in two layers
    torch.testing.assert_close(models.logits(merged), expected, atol=5e-6, rtol=0)


def test_unloading_gives_back_the_packed_base() -> None:
    base = packed(SPECS[0])
    expected = models.logits(base)
    model = adapted(base, "LoRA")
    accelerate(model)
    assert torch.equal(models.logits(model.unload()), expected)


def test_fused_layers_switch_adapters_and_keep_pefts_files(tmp_path: Path) -> None:
    model = adapted(packed(SPECS[0]), "LoRA")
    model.add_adapter("second", peft.LoraConfig(r=2, init_lora_weights=False, **TWO))
    plain = copy.deepcopy(model)
    assert accelerate(model) == accelerate(model) == 4
    close = {"atol": 2e-6, "rtol": 0.0}  # as above
    for names in ("default", "second"):
        model.set_adapter(names)
        plain.set_adapter(names)
        torch.testing.assert_close(models.logits(model), models.logits(plain), **close)
    model.base_model.set_adapter(["default", "second"])
    plain.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(models.logits(model), models.logits(plain), **close)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(models.logits(model), models.logits(plain))
    model.save_pretrained(tmp_path)
    read = fl.PeftModel.from_pretrained(packed(SPECS[0]), tmp_path / "second")
    plain.set_adapter("second")
    torch.testing.assert_close(models.logits(read), models.logits(plain), **close)


def test_dropout_of_the_fused_layer_has_the_mean_of_no_dropout() -> None:
    layer = nn.Sequential(nn.Linear(64, 64, bias=False))
    fl.quantize_model(layer)
    model = peft.get_peft_model(layer, peft.LoraConfig(r=8, lora_dropout=0.5, target_modules=["0"]))
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
    accelerate(model)
    x = torch.randn(1, 64).expand(4096, 64)
    dropped, kept = model.train()(x), model.eval()(x)
    assert not torch.equal(dropped[0], dropped[1])
    error = dropped.mean(0) - kept[0]
    assert (error.abs() <= 6 * dropped.std(0) / 4096**0.5).all()  # six standard errors of the mean


def test_a_model_without_packed_layers_is_refused() -> None:
    with pytest.raises(fl.UnsupportedError, match="load the base with FerroloraConfig"):
        accelerate(peft.get_peft_model(models.llama(), METHODS["LoRA"]()))
