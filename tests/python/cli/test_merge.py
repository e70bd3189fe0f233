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
