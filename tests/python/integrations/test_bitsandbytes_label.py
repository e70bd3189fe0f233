"""Checkpoints of ours in bitsandbytes, and its checkpoints here, with the same weights."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import ferrolora as fl
from ferrolora.integrations.transformers import read_config
from ferrolora.io.bitsandbytes import export_checkpoint, label_of_spec, spec_of_label
from ferrolora.nn import QuantLinear
from tiny.models import llama, logits


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_transformers_loads_it_with_bitsandbytes(tmp_path: Path, quant_type: str, double_quant: bool) -> None:
    # Widths that are multiples of the block, where bitsandbytes' CPU kernels are right.
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "float")
    config = fl.FerroloraConfig(quant_type, 64, double_quant)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    ours.save_pretrained(tmp_path / "q")

    export_checkpoint(tmp_path / "q", tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", device_map="cpu")

    layers = [(name, layer) for name, layer in ours.named_modules() if isinstance(layer, QuantLinear)]
    assert len(layers) == 14
    for name, layer in layers:
        read = theirs.get_submodule(name)
        assert isinstance(read, Linear4bit)
        assert torch.equal(read.weight.data, layer.weight.data)
        decoded = dequantize_4bit(read.weight.data, read.weight.quant_state)
        # Decoding a nested scale is one multiply and one add, which a fused instruction rounds once instead of twice.
        torch.testing.assert_close(decoded, layer.dequantize(), rtol=2**-22, atol=0)


def test_an_8bit_checkpoint_of_ours_is_read_by_bitsandbytes_and_its_float_layers_stay_float(tmp_path: Path) -> None:
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "float")
    config = fl.FerroloraConfig("int8", skip_modules=["model.layers.1.mlp.down_proj"])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    ours.save_pretrained(tmp_path / "q")
    export_checkpoint(tmp_path / "q", tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", device_map="cpu")
    assert type(theirs.get_submodule("model.layers.1.mlp.down_proj")) is torch.nn.Linear
    layers = [(name, layer) for name, layer in ours.named_modules() if isinstance(layer, QuantLinear)]
    assert len(layers) == 13
    for name, layer in layers:
        read = theirs.get_submodule(name)
        assert isinstance(read, Linear8bitLt)
        assert torch.equal(read.weight.data, layer.weight.data)
        assert torch.equal(read.weight.SCB, layer.weight_absmax)


BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4, stored as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
WITHOUT_BITSANDBYTES = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch, ferrolora as fl
from transformers import AutoModelForCausalLM
from ferrolora.integrations.transformers import read_config
from ferrolora.nn import QuantLinear
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, config=read_config(folder), dtype=torch.float32).eval()
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    with torch.no_grad():
        torch.save(model(input_ids=torch.arange(12).view(2, 6)).logits, f"{folder}/logits.pt")
assert "bitsandbytes" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # it casts its inputs, and says so
def test_checkpoints_of_bitsandbytes_load_without_it_and_give_what_their_weights_give(tmp_path: Path) -> None:
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "float")
    expected = {}
    for name, options in BITSANDBYTES.items():
        quantization = BitsAndBytesConfig(**options)
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path / "float", quantization_config=quantization, device_map="cpu"
        )
        theirs.save_pretrained(tmp_path / name)
        expected[name] = logits(theirs.dequantize(dtype=torch.float32).float())
    command = [sys.executable, "-c", WITHOUT_BITSANDBYTES, *(str(tmp_path / name) for name in BITSANDBYTES)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, answer in expected.items():
        # the same weights; sums of at most 128 float32 products in another order, through two layers
        torch.testing.assert_close(torch.load(tmp_path / name / "logits.pt"), answer, atol=2e-5, rtol=0)


def test_labels_are_read_as_they_are_written() -> None:
    for spec in (fl.QuantSpec("nf4"), fl.QuantSpec("fp4", 64, double_quant=False), fl.QuantSpec("int8")):
        assert spec_of_label(label_of_spec(spec)) == spec
    with pytest.raises(fl.FormatError, match="'gptq'"):
        spec_of_label({"quant_method": "gptq"})
    with pytest.raises(fl.FormatError, match="neither load_in_4bit nor load_in_8bit"):
        spec_of_label({"quant_method": "bitsandbytes"})


def test_only_a_checkpoint_of_ours_is_exported_and_nothing_is_overwritten(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    with pytest.raises(fl.FormatError, match="quant_method is None"):
        export_checkpoint(tmp_path / "float", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=fl.FerroloraConfig())
    model.save_pretrained(tmp_path / "q")
    with pytest.raises(fl.FormatError, match="not empty"):
        export_checkpoint(tmp_path / "q", tmp_path / "float")
    assert getattr(read_config(tmp_path / "float"), "quantization_config", None) is None


def test_the_example_loads_the_same_weights_three_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llama().save_pretrained(tmp_path / "float")
    script = Path(__file__).resolve().parents[3] / "examples/checkpoints.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "float"), str(tmp_path / "out")])
    runpy.run_path(str(script), run_name="__main__")
    assert "14 weights quantized" in capsys.readouterr().out
