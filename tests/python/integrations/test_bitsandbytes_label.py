"""A checkpoint we wrote, labelled for bitsandbytes, is read by bitsandbytes with the same weights."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM

import ferrolora as fl
from ferrolora.nn import QuantLinear
from tiny.models import llama


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_transformers_loads_it_with_bitsandbytes(tmp_path: Path, quant_type: str, double_quant: bool) -> None:
    # Widths that are multiples of the block, where bitsandbytes' CPU kernels are right.
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "float")
    config = fl.FerroloraConfig(quant_type, 64, double_quant)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    ours.save_pretrained(tmp_path / "q")

    file = tmp_path / "q/config.json"
    content = json.loads(file.read_text())
    content["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": "float32",
    }
    file.write_text(json.dumps(content))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")

    layers = [(name, layer) for name, layer in ours.named_modules() if isinstance(layer, QuantLinear)]
    assert len(layers) == 14
    for name, layer in layers:
        read = theirs.get_submodule(name)
        assert isinstance(read, Linear4bit)
        assert torch.equal(read.weight.data, layer.weight.data)
        decoded = dequantize_4bit(read.weight.data, read.weight.quant_state)
        # Decoding a nested scale is one multiply and one add, which a fused instruction rounds once instead of twice.
        torch.testing.assert_close(decoded, layer.dequantize(), rtol=2**-22, atol=0)
