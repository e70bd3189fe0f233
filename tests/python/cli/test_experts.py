"""Fused experts on the command line: counted, or refused with what to do instead."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import ferrolora as fl
from ferrolora.train.memory import base_memory
from tiny.models import qwen3_moe


@pytest.fixture
def base(tmp_path: Path) -> Path:
    qwen3_moe().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=fl.FerroloraConfig())


def test_quantize(cli, base: Path, tmp_path: Path) -> None:
    refused = cli("quantize", base, tmp_path / "out")
    assert refused.status == 1
    assert "from_pretrained" in refused.err
    assert "skipping 'experts'" in refused.err
    assert cli("quantize", base, tmp_path / "out", "--skip", "experts").status == 0


def test_inspect_counts_packed_experts_in_weights(cli, base: Path, tmp_path: Path) -> None:
    load(base).save_pretrained(tmp_path / "packed")
    content = json.loads(cli("inspect", tmp_path / "packed", "--json").out)
    memory = base_memory(load(base))
    (packed,) = [part for part in content["parts"] if part["what"].startswith("nf4")]
    assert packed["parameters"] == memory.linear_parameters
    assert content["quantized_layers"]["gate_up_proj"] == content["quantized_layers"]["down_proj"] == 2
    assert all(part["what"] in ("float32", packed["what"]) for part in content["parts"])


def test_merge_of_an_adapter_on_experts(cli, base: Path, tmp_path: Path) -> None:
    config = fl.LoraConfig(target_parameters=["experts.down_proj"])
    fl.get_peft_model(load(base), config).save_pretrained(tmp_path / "adapter")
    for command in (
        ("merge", base, tmp_path / "adapter", tmp_path / "out"),
        ("export", "adapter", tmp_path / "adapter", tmp_path / "out"),
    ):
        refused = cli(*command)
        assert refused.status == 1
        assert "target_parameters" in refused.err


def test_merge_into_packed_experts(cli, base: Path, tmp_path: Path) -> None:
    model = load(base)
    model.save_pretrained(tmp_path / "packed")
    fl.get_peft_model(model, fl.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    refused = cli("merge", tmp_path / "packed", tmp_path / "adapter", tmp_path / "out")
    assert refused.status == 1
    assert "packed experts" in refused.err
    assert "merge_and_unload()" in refused.err
