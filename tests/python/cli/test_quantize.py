"""`ferrolora quantize`: the directory it writes is the one that transformers would have saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import ferrolora as fl
from ferrolora.io.checkpoint import Checkpoint
from tiny.folders import save
from tiny.models import gpt2, logits

CHOICES = [
    [],
    ["--quant", "fp4", "--block-size", "32", "--no-double-quant"],
    ["--quant", "int8"],
    ["--skip", "down_proj"],
]


@pytest.mark.parametrize("options", CHOICES, ids=" ".join)
def test_the_result_loads_with_the_logits_of_a_model_quantized_while_loading(cli, causal, tmp_path, options) -> None:
    assert cli("quantize", causal, tmp_path / "q", *options).status == 0
    read = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    config = fl.FerroloraConfig(**read)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    expected = AutoModelForCausalLM.from_pretrained(causal, quantization_config=config)
    assert torch.equal(logits(model), logits(expected))
    assert len(Checkpoint(tmp_path / "q").files) == len(Checkpoint(causal).files) > 1
    assert (tmp_path / "q/tokenizer.json").is_file()


def test_layers_stored_by_gpt2_in_the_other_orientation_are_turned(cli, tmp_path: Path) -> None:
    source = save(gpt2(), tmp_path / "gpt2")
    assert cli("quantize", source, tmp_path / "q").status == 0
    expected = AutoModelForCausalLM.from_pretrained(source, quantization_config=fl.FerroloraConfig())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "q")), logits(expected))


def test_json_and_report_give_the_error_of_each_weight(cli, causal: Path, tmp_path: Path) -> None:
    done = cli("quantize", causal, tmp_path / "q", "--report", "--json")
    content = json.loads(done.out)
    assert content["quantized"] == len(content["reports"]) == 14
    assert content["bytes_after"] < content["bytes_before"]
    # NF4 of normal weights: the mean squared gap of 16 quantiles is about (0.09)² of the variance.
    assert all(0.05 < report["relative_error"] < 0.13 for report in content["reports"])
    assert not done.err


def test_an_existing_directory_is_kept_unless_asked(cli, causal: Path, tmp_path: Path) -> None:
    cli("quantize", causal, tmp_path / "q")
    done = cli("quantize", causal, tmp_path / "q")
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert "--overwrite" in done.err
    assert cli("quantize", causal, tmp_path / "q", "--overwrite").status == 0


def test_a_weight_with_an_infinity_is_named(cli, causal: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    shard = Checkpoint(causal).file_of[name]
    tensors = load_file(shard)
    tensors[name][0, 0] = float("inf")
    save_file(tensors, shard)
    done = cli("quantize", causal, tmp_path / "q")
    assert done.status == 1
    assert name in done.err


def test_a_directory_that_holds_no_model_is_named(cli, tmp_path: Path) -> None:
    done = cli("quantize", tmp_path, tmp_path / "q")
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert str(tmp_path) in done.err
