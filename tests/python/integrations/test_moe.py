"""Mixture-of-experts checkpoints through `from_pretrained`, `quantize_model` and the command line."""

import runpy
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import ferrolora as fl
from ferrolora.errors import FormatError, UnsupportedError
from ferrolora.integrations.checkpoint_names import linear_tensors
from ferrolora.integrations.weight_conversion import QuantizeWeight
from ferrolora.io.checkpoint import Checkpoint
from ferrolora.io.quantize_checkpoint import quantize_checkpoint
from ferrolora.nn import QuantExperts, QuantLinear
from ferrolora.nn.expert_stack import stack_state
from ferrolora.nn.experts import PROJECTIONS
from ferrolora.train.memory import base_memory
from tiny.models import logits, mixtral, qwen3_moe, token_ids

MODELS = {"mixtral": mixtral, "qwen3_moe": qwen3_moe}
CONFIGS = {
    "nf4": {},
    "nf4 plain scales": {"double_quant": False, "block_size": 128},
    "fp4": {"quant_type": "fp4", "block_size": 32},
    "int8": {"quant_type": "int8"},
}
EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(3)
        model = request.param()
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter.data, std=0.2)
        return model

    return build


@pytest.fixture
def folder(make: Callable[[], nn.Module], tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def load(folder: Path, dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=fl.FerroloraConfig(**config), dtype=dtype)


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_and_reloaded_model_gives_identical_logits(folder: Path, tmp_path: Path, config, dtype) -> None:
    model = load(folder, dtype, **config)
    model.save_pretrained(tmp_path / "saved", max_shard_size="16KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert kinds(again) == kinds(model)
    assert torch.equal(logits(again), logits(model))


def test_experts_and_attention_are_packed_and_routers_and_head_are_not(folder: Path) -> None:
    model = load(folder)
    for layer in model.model.layers:
        assert type(layer.mlp.experts) is QuantExperts
        assert type(layer.self_attn.q_proj) is QuantLinear
        assert layer.mlp.gate.weight.dtype == torch.float32
    assert type(model.lm_head) is nn.Linear


def test_the_checkpoints_single_experts_become_the_packed_ones(make, folder: Path) -> None:
    source, model = make(), load(folder)
    assert any(".experts.3." in name for name in load_file(folder / "model.safetensors"))
    for layer, packed in zip(source.model.layers, model.model.layers, strict=True):
        for projection in PROJECTIONS:
            for index, weight in enumerate(layer.mlp.experts.get_parameter(projection)):
                alone = fl.quantize(weight, fl.QuantSpec())
                found = packed.mlp.experts.stack(projection).expert(index)
                assert torch.equal(found.codes, alone.codes)
                assert torch.equal(found.dequantize(), alone.dequantize())


def test_loading_equals_quantizing_in_place_and_the_two_save_the_same_tensors(make, folder, tmp_path) -> None:
    loaded, in_place = load(folder), fl.quantize_model(make())
    assert torch.equal(logits(loaded), logits(in_place))
    loaded.save_pretrained(tmp_path / "loaded")
    in_place.save_pretrained(tmp_path / "in_place")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("loaded", "in_place"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


def test_a_reloaded_model_saves_the_same_file_with_the_documented_keys(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    experts = model.model.layers[0].mlp.experts
    for projection in PROJECTIONS:
        for part, tensor in stack_state(experts.stack(projection)).items():
            (key,) = [name for name in first if "layers.0." in name and name.endswith(f".{projection}_{part}")]
            assert torch.equal(first[key], tensor)


def test_bits_per_weight_of_the_whole_model(folder: Path) -> None:
    memory = base_memory(load(folder))
    model = load(folder)
    packed = [m for m in model.modules() if isinstance(m, (QuantLinear, QuantExperts))]
    stacks = [
        s for m in packed for s in (map(m.stack, PROJECTIONS) if isinstance(m, QuantExperts) else [m.quant_tensor()])
    ]
    assert memory.linear_parameters == sum(stack.numel() for stack in stacks)
    assert memory.bits_per_parameter == 8 * sum(s.nbytes for s in stacks) / sum(s.numel() for s in stacks)
    assert memory.bits_per_parameter < 4.3  # 32 bits of scales a matrix weigh more in matrices of 800 values


def test_no_two_float_tensors_are_held_at_once_while_loading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest is one projection of all experts of a layer; transformers joins it out of the single experts'."""
    alive: list[weakref.ref[torch.Tensor]] = []
    inner = QuantizeWeight.convert

    def watched(self: QuantizeWeight, input_dict: dict[str, object], **context: object):
        assert not [ref for ref in alive if ref() is not None]
        values = [value[0] if isinstance(value, list) else value for value in input_dict.values()]
        alive.extend(map(weakref.ref, values))
        return inner(self, input_dict, **context)

    monkeypatch.setattr(QuantizeWeight, "convert", watched)
    load(folder)
    assert len(alive) == 2 * (4 + 2)


def test_skipped_experts_stay_float_and_come_back(make, folder: Path, tmp_path: Path) -> None:
    model = load(folder, skip_modules=["experts"])
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, make().model.layers[0].mlp.experts.down_proj)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert not any(isinstance(m, QuantExperts) for m in fl.quantize_model(make(), skip_modules=["experts"]).modules())


def test_dequantize_gives_back_the_models_own_experts(make, folder: Path) -> None:
    model = load(folder)
    before = [layer.mlp.experts.dequantize("down_proj") for layer in model.model.layers]
    plain = model.dequantize(torch.float32)
    for layer, weight in zip(plain.model.layers, before, strict=True):
        assert type(layer.mlp.experts) is type(make().model.layers[0].mlp.experts)
        assert torch.equal(layer.mlp.experts.down_proj, weight)


def test_a_checkpoint_without_one_of_the_projections_is_refused(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "saved")
    for place, mark in (
        (folder, (".w2.", ".experts.0.down_proj", "down_proj.weight")),
        (tmp_path / "saved", ("experts.down_proj_",)),
    ):
        tensors = load_file(place / "model.safetensors")
        kept = {
            k: t for k, t in tensors.items() if not any(m in k for m in mark) or "layers.1." in k or "self_attn" in k
        }
        assert len(kept) < len(tensors)
        save_file(kept, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"lacks model\.layers\.0\.mlp\.experts\.down_proj"):
        load(folder)
    with pytest.raises(FormatError, match=r"lacks model\.layers\.0\.mlp\.experts\.down_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_the_streaming_command_refuses_experts_unless_they_are_skipped(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"mlp\.experts holds fused experts.*from_pretrained.*'experts'"):
        linear_tensors(folder)
    weights, config = linear_tensors(folder, ["experts"]).weights, fl.FerroloraConfig(skip_modules=["experts"])
    quantize_checkpoint(folder, tmp_path / "streamed", weights, config.spec, config.to_dict())
    assert len(Checkpoint(tmp_path / "streamed").tensors) > len(weights)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype=torch.float32)
    assert torch.equal(logits(streamed), logits(load(folder, skip_modules=["experts"])))


def test_gradient_checkpointing_gives_the_same_gradients(folder: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        model = fl.prepare_model_for_kbit_training(load(folder), use_gradient_checkpointing=checkpointing)
        config = fl.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.down_proj"], r=2)
        torch.manual_seed(0)
        model = fl.get_peft_model(model, config).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter.data, std=0.1)
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["moe.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "moe.py"), run_name="__main__")
    assert "same logits after reloading: True" in capsys.readouterr().out
