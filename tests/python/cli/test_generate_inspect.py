"""`ferrolora generate` and `ferrolora inspect`."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ferrolora as fl


@pytest.fixture
def adapter(causal: Path, tmp_path: Path) -> Path:
    base = AutoModelForCausalLM.from_pretrained(causal, quantization_config=fl.FerroloraConfig())
    model = fl.get_peft_model(base, fl.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_text_is_generated_with_and_without_an_adapter(cli, causal: Path, adapter: Path) -> None:
    arguments = ["generate", causal, "--prompt", "abc", "--max-new-tokens", 8]
    plain = cli(*arguments)
    assert plain.status == 0, plain.err
    as_json = json.loads(cli(*arguments, "--json").out)
    assert as_json["text"].strip() == plain.out.strip()
    assert 1 <= as_json["tokens"] <= 8
    adapted = json.loads(cli(*arguments, "--json", "--adapter", adapter).out)
    assert adapted["text"] != as_json["text"]


def test_sampling_repeats_by_its_seed(cli, causal: Path) -> None:
    arguments = ["generate", causal, "--prompt", "abc", "--temperature", 2.0, "--json", "--max-new-tokens", 12]
    texts = [json.loads(cli(*arguments, "--seed", seed).out)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_chat_template_wraps_the_prompt(cli, causal: Path) -> None:
    assert cli("generate", causal, "--prompt", "hi", "--chat", "--max-new-tokens", 2).status == 0


def test_inspect_sums_a_checkpoint_by_type(cli, causal: Path, tmp_path: Path) -> None:
    cli("quantize", causal, tmp_path / "q")
    content = json.loads(cli("inspect", tmp_path / "q", "--json", "--tensors").out)
    packed, floats = content["parts"]
    assert packed["what"] == "nf4, blocks of 64, double quantization"
    assert packed["tensors"] == 14
    assert packed["parameters"] == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    assert floats["what"] == "float32"
    assert content["quantized_layers"]["q_proj"] == 2
    assert packed["bytes"] + floats["bytes"] == content["bytes"]
    assert "lm_head.weight" in content["tensors"]
    text = cli("inspect", tmp_path / "q").out
    assert "nf4, blocks of 64" in text


def test_inspect_tells_int8_from_the_file_alone(cli, causal: Path, tmp_path: Path) -> None:
    cli("quantize", causal, tmp_path / "q", "--quant", "int8")
    file = next((tmp_path / "q").glob("model-00002*"))
    assert json.loads(cli("inspect", file, "--json").out)["parts"][0]["what"] == "int8"


def test_inspect_describes_an_adapter(cli, adapter: Path) -> None:
    content = json.loads(cli("inspect", adapter, "--json").out)
    assert content["peft_type"] == "LORA"
    assert content["r"] == 4
    assert content["tensors_by_module"] == {"q_proj": 4}
    assert content["parameters"] == 2 * (4 * 32 + 32 * 4)
    assert "target_modules: ['q_proj']" in cli("inspect", adapter).out


def test_text_from_a_checkpoint_exported_for_bitsandbytes_is_the_text_of_ours(
    cli, causal: Path, tmp_path: Path
) -> None:
    assert cli("quantize", causal, tmp_path / "q").status == 0
    assert cli("export", "bitsandbytes", tmp_path / "q", tmp_path / "b").status == 0
    assert '"bitsandbytes"' in (tmp_path / "b/config.json").read_text()
    answers = [cli("generate", tmp_path / name, "--prompt", "hello", "--max-new-tokens", 4) for name in "qb"]
    assert answers[0].status == 0
    assert answers[1].out == answers[0].out
