"""`from_pretrained` with a FerroloraConfig: what is quantized, what is kept, and what a reload gives."""

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
)

import ferrolora as fl
from ferrolora.errors import UnsupportedError
from ferrolora.integrations.weight_conversion import QuantizeWeight
from ferrolora.io.checkpoint import Checkpoint
from ferrolora.nn import QuantLinear
from ferrolora.nn.quant_state import state_keys, to_state
from tiny.models import bert_classifier, gpt2, llama, logits

CONFIGS = {
    "nf4": {},
    "nf4 plain scales": {"double_quant": False, "block_size": 128},
    "fp4": {"quant_type": "fp4", "block_size": 32},
    "int8": {"quant_type": "int8"},
}
LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quantized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def load(folder: Path, dtype: torch.dtype = torch.float32, **config: object) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=fl.FerroloraConfig(**config), dtype=dtype)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_saved_and_reloaded_model_gives_identical_logits(folder: Path, tmp_path: Path, config, dtype) -> None:
    model = load(folder, dtype, **config)
    model.save_pretrained(tmp_path / "saved", max_shard_size="8KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert quantized(again) == quantized(model)
    assert again.dtype == dtype
    assert torch.equal(logits(again), logits(model))


def test_a_reloaded_model_saves_the_same_file(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_file_holds_the_documented_keys_and_the_codes_of_the_float_weight(folder, tmp_path, config) -> None:
    load(folder, **config).save_pretrained(tmp_path / "saved")
    source, saved = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved/model.safetensors")
    spec = fl.FerroloraConfig(**config).spec
    prefix = "model.layers.1.mlp.down_proj."
    assert sorted(name for name in saved if name.startswith(prefix)) == sorted(prefix + key for key in state_keys(spec))
    for key, value in to_state(fl.quantize(source[f"{prefix}weight"], spec)).items():
        assert torch.equal(saved[prefix + key], value)


def test_every_linear_of_the_backbone_is_quantized_and_the_output_head_is_not(folder: Path) -> None:
    model = load(folder)
    assert sorted({name.rpartition(".")[2] for name in quantized(model)}) == sorted(LLAMA_LINEARS)
    assert len(quantized(model)) == 2 * len(LLAMA_LINEARS)
    assert type(model.lm_head) is nn.Linear


def test_a_new_task_head_is_initialised_in_float_over_a_quantized_encoder(tmp_path: Path) -> None:
    bert_classifier().bert.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=fl.FerroloraConfig(), num_labels=3
    )
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.isfinite().all()
    assert model.classifier.weight.abs().sum() > 0
    assert type(model.bert.pooler.dense) is QuantLinear


def test_a_trained_task_head_is_not_quantized_either(tmp_path: Path) -> None:
    trained = bert_classifier()
    trained.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=fl.FerroloraConfig())
    assert torch.equal(model.classifier.weight, trained.classifier.weight)


def test_a_layer_missing_from_the_checkpoint_is_initialised_in_float(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert model.model.layers[0].mlp.up_proj.weight.isfinite().all()
    assert type(model.model.layers[1].mlp.up_proj) is QuantLinear


def test_biases_survive_in_every_order_of_loading(tmp_path: Path) -> None:
    trained = bert_classifier()
    for parameter in trained.parameters():
        parameter.data.normal_()
    trained.save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=fl.FerroloraConfig())
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert torch.equal(module.bias, trained.get_parameter(f"{name}.bias"))


def test_modules_named_by_the_user_are_skipped_besides_the_head(folder: Path) -> None:
    model = load(folder, skip_modules=["down_proj", "model.layers.0.self_attn.*"])
    names = quantized(model)
    assert not any(name.endswith("down_proj") or "layers.0.self_attn" in name for name in names)
    assert "model.layers.1.self_attn.q_proj" in names
    assert type(model.lm_head) is nn.Linear


def test_conv1d_layers_of_gpt2_are_quantized_in_the_orientation_of_a_linear_layer(tmp_path: Path) -> None:
    float_model = gpt2()
    float_model.save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=fl.FerroloraConfig())
    layer = model.transformer.h[0].attn.c_attn
    expected = fl.quantize(float_model.transformer.h[0].attn.c_attn.weight.T.contiguous())
    assert (layer.out_features, layer.in_features) == (96, 32)
    assert torch.equal(layer.weight, expected.codes)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


def test_a_quantized_model_loads_as_its_bare_backbone(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    backbone = AutoModel.from_pretrained(tmp_path / "saved")
    ids = torch.arange(6)[None]
    assert torch.equal(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_quantized_encoder_takes_a_new_head(tmp_path: Path) -> None:
    bert_classifier().bert.save_pretrained(tmp_path / "float")
    BertModel.from_pretrained(tmp_path / "float", quantization_config=fl.FerroloraConfig()).save_pretrained(
        tmp_path / "q"
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "q", num_labels=5)
    assert len(quantized(model)) == 13
    assert model.classifier.out_features == 5


def test_plain_weights_of_a_quantized_checkpoint_take_the_type_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    load(folder, torch.float32).save_pretrained(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.weight_nested_absmax.dtype == torch.float32


def test_no_two_float_weights_are_held_at_once_while_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    inner = QuantizeWeight.convert

    def watched(self: QuantizeWeight, input_dict: dict[str, list[torch.Tensor]], **context: object):
        assert not [ref for ref in alive if ref() is not None]
        alive.extend(weakref.ref(values[0]) for values in input_dict.values())
        return inner(self, input_dict, **context)

    monkeypatch.setattr(QuantizeWeight, "convert", watched)
    load(folder)
    assert len(alive) == 14


def test_dequantize_gives_back_a_float_model(folder: Path) -> None:
    model = load(folder)
    before = logits(model)
    plain = model.dequantize()
    assert not quantized(plain)
    # The same products in another order of float32 sums over K <= 48, through two layers of width 32.
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-5)


def test_compute_dtype_is_what_dequantize_gives_and_is_kept_in_the_config(folder: Path, tmp_path: Path) -> None:
    model = load(folder, compute_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert stored["compute_dtype"] == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.model.layers[0].mlp.up_proj.dequantize().dtype == torch.bfloat16


def test_a_weight_with_a_nan_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    # transformers collects the errors of all tensors, logs them and raises its own.
    with pytest.raises(RuntimeError):
        load(folder)
    assert "model.layers.0.mlp.up_proj.weight holds 1 NaN" in caplog.text


def test_a_packed_weight_without_its_scales_is_an_error(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved/model.safetensors"
    prefix = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {k: v for k, v in load_file(file).items() if not k.startswith(f"{prefix}.")}, file, metadata={"format": "pt"}
    )
    with pytest.raises(RuntimeError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_device_without_kernels_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="xpu:0"):
        AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=fl.FerroloraConfig(), device_map={"": torch.device("xpu:0")}
        )


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_of_the_cpu_is_accepted(folder: Path, device_map) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=fl.FerroloraConfig(), device_map=device_map
    )
    assert model.device.type == "cpu"
    assert len(quantized(model)) == 14


def test_a_model_without_a_linear_layer_to_quantize_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="no linear layer"):
        load(folder, skip_modules=["model"])


@pytest.mark.parametrize("wrong", [{"quant_type": "nf5"}, {"block_size": 48}, {"compute_dtype": "int8"}])
def test_a_config_that_names_no_codec_is_refused_and_lists_the_valid_values(wrong: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match="one of"):
        fl.FerroloraConfig(**wrong)


def test_the_stored_size_of_a_weight_is_known_before_loading(folder: Path) -> None:
    model = load(folder)
    layer = model.model.layers[0].mlp.up_proj
    estimate = model.hf_quantizer.quantized_element_size * layer.in_features * layer.out_features
    # The estimate counts nested scales in shares; here 24 scales need a whole one of 4 bytes, and an offset of 4 bytes.
    assert 0 <= layer.quant_tensor().nbytes - estimate <= 8


def test_a_checkpoint_quantized_while_loading_is_as_small_as_promised(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "saved")
    assert Checkpoint(tmp_path / "saved").nbytes < Checkpoint(folder).nbytes
