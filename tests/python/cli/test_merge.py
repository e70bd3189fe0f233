"""`ferrolora merge` and `ferrolora export adapter` against merging in memory."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import ferrolora as fl
from ferrolora.cli.app import run
from tiny import folders, models
from tiny.methods import CASES, perturb

METHODS = ["LoRA", "rsLoRA", "DoRA", "LoRA with token rows", "PiSSA", "IA3", "LoHa", "AdaLoRA"]


def saved(tmp_path: Path, config: Any, base: Any = None, scale: float = 0.1) -> fl.PeftModel:
    base = base or models.llama()
    folders.save(base, tmp_path / "base", shard_size="20KB")
    model = fl.get_peft_model(copy.deepcopy(base), config)
    perturb(model, scale)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval()


def merge(tmp_path: Path, *options: str) -> int:
    return run(["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), str(tmp_path / "out"), *options])


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_directory_answers_as_the_adapted_model(method: str, tmp_path: Path) -> None:
    model = saved(tmp_path, CASES[method].ours())
    assert merge(tmp_path) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    # (W + Δ)x for Wx + Δx: float32 sums of 48 products in another order, in two layers
    torch.testing.assert_close(models.logits(merged), models.logits(model), atol=2e-6, rtol=0)


def test_conv1d_biases_and_full_modules_go_in_too(tmp_path: Path) -> None:
    config = fl.LoraConfig(target_modules=["c_attn", "c_proj"], bias="all", modules_to_save=["ln_f"])
    model = saved(tmp_path, config, models.gpt2())
    assert merge(tmp_path) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(models.logits(merged), models.logits(model), atol=5e-6, rtol=0)


def test_sixteen_bits_are_what_was_asked_for(tmp_path: Path) -> None:
    saved(tmp_path, CASES["LoRA"].ours())
    assert merge(tmp_path, "--dtype", "bfloat16") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}


def test_quantized_from_the_original_weights_most_of_the_adapter_survives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path, fl.LoraConfig(target_modules="all-linear", r=4), scale=0.05)
    assert merge(tmp_path, "--quant", "nf4", "--min-retained", "0.5") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip().endswith("%")]
    assert len(lines) == 14
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.quantization_config is not None


@pytest.mark.parametrize("quant", ["nf4", "int8"])
@pytest.mark.parametrize("base", [models.llama, models.gpt2])
def test_a_quantized_model_becomes_the_float_model_that_training_saw(base: Any, quant: str, tmp_path: Path) -> None:
    folders.save(base(), tmp_path / "float")
    assert run(["quantize", str(tmp_path / "float"), str(tmp_path / "base"), "--quant", quant]) == 0
    config = fl.LoraConfig(target_modules="all-linear", r=4)
    model = fl.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    perturb(model, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not hasattr(merged.config, "quantization_config")
    # float32 sums of at most 128 products in another order, in two layers
    torch.testing.assert_close(models.logits(merged), models.logits(model.eval()), atol=5e-6, rtol=0)
    in_memory = model.merge_and_unload(dtype=torch.float32).state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, in_memory[name]), name


@pytest.mark.parametrize("merged", [True, False])
def test_gpt2_in_float_again_has_conv1d_again(merged: bool, tmp_path: Path) -> None:
    base = folders.save(models.gpt2(), tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=fl.FerroloraConfig())
    adapted = fl.get_peft_model(model, fl.LoraConfig(target_modules=["c_attn"]))
    perturb(adapted)
    result: Any = adapted.merge_and_unload(dtype=torch.float32) if merged else adapted.unload().dequantize()
    result.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # c_proj is square: transposed it would load too
    assert type(result.transformer.h[0].attn.c_proj) is type(again.transformer.h[0].attn.c_proj)
    assert torch.equal(models.logits(again), models.logits(result))


def test_a_quantized_model_keeps_the_type_it_had(tmp_path: Path) -> None:
    folders.save(models.llama().to(torch.bfloat16), tmp_path / "float")
    assert run(["quantize", str(tmp_path / "float"), str(tmp_path / "base")]) == 0
    model = fl.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), CASES["LoRA"].ours())
    model.save_pretrained(tmp_path / "adapter")
    assert merge(tmp_path) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert merge(tmp_path, "--quant", "nf4", "--overwrite") == 0, "an adapter of zeros loses nothing"


def test_quantized_from_weights_on_the_grid_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = models.llama()
    with torch.no_grad():
        for module in base.model.layers.modules():
            if isinstance(module, torch.nn.Linear):  # what a 4-bit checkpoint decodes to
                module.weight.copy_(fl.dequantize(fl.quantize(module.weight, fl.QuantSpec("nf4"))))
    saved(tmp_path, fl.LoraConfig(target_modules="all-linear", r=4), base, scale=0.0005)
    assert merge(tmp_path, "--quant", "nf4") == 1
    assert "of the adapter survived" in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.json").exists()


def test_an_adapter_for_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, CASES["LoRA"].ours())
    shutil.rmtree(tmp_path / "base")
    folders.save(models.llama(hidden_size=16), tmp_path / "base")
    assert merge(tmp_path) == 1
    assert "the file has [32, 4]" in capsys.readouterr().err


def test_virtual_tokens_cannot_be_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path, CASES["Prompt tuning"].ours())
    assert merge(tmp_path) == 1
    assert "no weight can hold" in capsys.readouterr().err


def test_an_exported_adapter_has_its_scaling_in_b(tmp_path: Path) -> None:
    config = fl.LoraConfig(
        target_modules=["q_proj", "v_proj"],
        r=4,
        lora_alpha=12,
        use_rslora=True,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 5},
    )
    model = saved(tmp_path, config)
    assert run(["export", "adapter", str(tmp_path / "adapter"), str(tmp_path / "exported")]) == 0
    again = fl.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "exported")
    plain = again.peft_config["default"]
    assert (plain.lora_alpha, plain.alpha_pattern, plain.use_rslora) == (4, {}, False)
    torch.testing.assert_close(models.logits(again), models.logits(model), atol=1e-6, rtol=0)
