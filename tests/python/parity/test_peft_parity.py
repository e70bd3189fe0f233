"""The same adapter in ferrolora and in PEFT 0.21: files, keys, logits, both ways, on float bases."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn

import ferrolora as fl
from tiny import models

# What PEFT itself warns of: it reads a deprecated attribute of transformers 5, corrects fan_in_fan_out, saves the
# embedding it adapts, and takes the bias of B for a damaged matrix.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor.s. have invalid shape:UserWarning"),
]

ModelMaker = Callable[[], nn.Module]

LLAMA_CASES = {
    "q_and_v": {"target_modules": ["q_proj", "v_proj"]},
    "regular expression": {"target_modules": r".*\.(up|down)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True, "r": 4, "lora_alpha": 16},
    "rank and alpha patterns": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5},
    },
    "a full module": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "one layer by pattern": {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.v_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}
GPT2_CASES = {"Conv1D": {"target_modules": ["c_attn", "c_proj"]}}
BERT_CASES = {
    "task head": {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    "all biases": {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"},
    "biases of adapted layers": {"target_modules": ["query"], "bias": "lora_only"},
    "bias of B": {"target_modules": ["query"], "lora_bias": True},
}
CASES = [
    pytest.param(maker, options, id=f"{maker.__name__}: {name}")
    for maker, cases in ((models.llama, LLAMA_CASES), (models.gpt2, GPT2_CASES), (models.bert_classifier, BERT_CASES))
    for name, options in cases.items()
]


def perturb(model: nn.Module) -> None:
    """Makes every trained parameter count: B is zero at the start, and an error in it would not show."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def file_keys(directory: Path) -> set[str]:
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


# The base forward and the low-rank branch are the same torch calls in the same order here and in PEFT, so there is no
# difference in the order of sums either: equality is exact.


@pytest.mark.parametrize(("maker", "options"), CASES)
def test_an_adapter_saved_here_gives_the_same_logits_in_peft(
    maker: ModelMaker, options: dict[str, object], tmp_path: Path
) -> None:
    base = maker()
    ours = fl.get_peft_model(copy.deepcopy(base), fl.LoraConfig(**options))
    perturb(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(models.logits(ours), models.logits(theirs))
    assert not torch.equal(models.logits(ours), models.logits(base))


@pytest.mark.parametrize(("maker", "options"), CASES)
def test_an_adapter_saved_by_peft_gives_the_same_logits_here(
    maker: ModelMaker, options: dict[str, object], tmp_path: Path
) -> None:
    base = maker()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = fl.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(models.logits(ours), models.logits(theirs))


@pytest.mark.parametrize(("maker", "options"), CASES)
def test_file_keys_and_trained_parameters_are_those_of_peft(
    maker: ModelMaker, options: dict[str, object], tmp_path: Path
) -> None:
    base = maker()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    ours = fl.get_peft_model(copy.deepcopy(base), fl.LoraConfig(**options))
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (theirs, ours)]
    assert trained[0] == trained[1]
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    # With bias="all" PEFT writes the bias of a full module three times: as itself, and under two names that only its
    # wrapper has. With a targeted embedding it adds the embedding's frozen base. Neither is read back.
    surplus = {
        key
        for key in file_keys(tmp_path / "theirs")
        if "original_module" in key or "modules_to_save" in key or key.endswith("embed_tokens.base_layer.weight")
    }
    assert file_keys(tmp_path / "theirs") - surplus == file_keys(tmp_path / "ours")


def test_peft_reads_our_config_and_we_read_theirs_field_by_field(tmp_path: Path) -> None:
    fl.LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"a": 2}).save_pretrained(tmp_path / "ours")
    peft.LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"a": 2}).save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert ours == theirs
    assert (
        peft.PeftConfig.from_pretrained(tmp_path / "ours").to_dict()
        == peft.PeftConfig.from_pretrained(tmp_path / "theirs").to_dict()
    )
    read = fl.PeftConfig.from_pretrained(tmp_path / "theirs")
    assert isinstance(read, fl.LoraConfig)
    assert (read.r, read.target_modules, read.rank_pattern) == (4, ["q_proj"], {"a": 2})


def test_a_saved_config_is_the_one_peft_saves(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    peft.get_peft_model(models.llama(), peft.LoraConfig(**options)).save_pretrained(tmp_path / "theirs")
    fl.get_peft_model(models.llama(), fl.LoraConfig(**options)).save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours/adapter_config.json").read_text() == (tmp_path / "theirs/adapter_config.json").read_text()


def test_the_same_seed_starts_the_same_adapter_as_in_peft() -> None:
    base = models.llama()
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    torch.manual_seed(1)
    ours = fl.get_peft_model(copy.deepcopy(base), fl.LoraConfig(**options))
    expected = peft.get_peft_model_state_dict(theirs)
    started = fl.get_peft_model_state_dict(ours)
    assert expected.keys() == started.keys()
    assert all(torch.equal(expected[key], started[key]) for key in expected)


def test_gradients_equal_those_of_peft_bit_for_bit() -> None:
    base = models.llama()
    options = {"target_modules": ["q_proj", "down_proj"], "r": 4, "init_lora_weights": False}
    grads = []
    for library in (peft, fl):
        torch.manual_seed(1)
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(**options))
        model(input_ids=models.token_ids(), labels=models.token_ids()).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_two_adapters_are_saved_and_read_in_subfolders_as_peft_has_them(tmp_path: Path) -> None:
    base = models.llama()
    ours = fl.get_peft_model(copy.deepcopy(base), fl.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    ours.add_adapter("second", fl.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    theirs.load_adapter(tmp_path / "second", "second")
    for name in ("default", "second"):
        ours.set_adapter(name)
        theirs.set_adapter(name)
        assert torch.equal(models.logits(ours), models.logits(theirs))


def test_a_merged_model_equals_the_one_peft_merges() -> None:
    base = models.llama()
    torch.manual_seed(1)
    config = {"target_modules": "all-linear", "init_lora_weights": False}
    ours = fl.get_peft_model(copy.deepcopy(base), fl.LoraConfig(**config))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    peft.set_peft_model_state_dict(theirs, fl.get_peft_model_state_dict(ours))
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    assert merged.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[key]) for key, tensor in merged.state_dict().items())
