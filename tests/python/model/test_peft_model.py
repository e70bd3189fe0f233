"""PeftModel over float bases: adapters by name, counting, saving, merging, and what it passes on to the base."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ferrolora as fl
from ferrolora.model.kbit import enable_checkpointing, is_checkpointing
from tiny import models
from tiny.models import logits


def config(**options: Any) -> fl.LoraConfig:
    return fl.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options))


def adapted(**options: Any) -> fl.PeftModel:
    return fl.get_peft_model(models.llama(), config(**options))


# -- construction ------------------------------------------------------------------------------------------------------


def test_names_in_memory_are_those_of_peft() -> None:
    names = dict(adapted().named_parameters())
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {f"{prefix}.base_layer.weight", f"{prefix}.lora_A.default.weight", f"{prefix}.lora_B.default.weight"} <= set(
        names
    )


def test_only_adapters_are_trained() -> None:
    trained = [name for name, p in adapted().named_parameters() if p.requires_grad]
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)


def test_the_callers_config_is_not_changed() -> None:
    given = fl.LoraConfig(task_type="SEQ_CLS")
    before = given.to_dict()
    fl.get_peft_model(models.bert_classifier(), given)
    assert given.to_dict() == before


@pytest.mark.parametrize("method", ["get_peft_model", "PeftModel"])
def test_a_model_that_has_adapters_is_refused(method: str) -> None:
    model = adapted()
    with pytest.raises(fl.UnsupportedError, match="add_adapter"):
        getattr(fl, method)(model, config())
    with pytest.raises(fl.UnsupportedError, match="add_adapter"):
        getattr(fl, method)(model.get_base_model(), config())


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (None, "PeftModel"),
        ("CAUSAL_LM", "PeftModelForCausalLM"),
        ("FEATURE_EXTRACTION", "PeftModelForFeatureExtraction"),
    ],
)
def test_the_task_chooses_the_class(task: str | None, expected: str) -> None:
    model = adapted(task_type=task)
    assert isinstance(model, getattr(fl, expected))
    assert isinstance(model, transformers.PreTrainedModel)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_classification_task_trains_its_head_and_leaves_it_float(task: str) -> None:
    model = fl.get_peft_model(models.bert_classifier(), fl.LoraConfig(task_type=task))
    assert model.peft_config["default"].modules_to_save == ["classifier", "score"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    wrapped = "base_model.model.classifier.modules_to_save.default"
    assert trained == {f"{wrapped}.weight", f"{wrapped}.bias"}


def test_a_plain_torch_module_can_be_adapted() -> None:
    model = fl.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), fl.LoraConfig(r=2))
    assert model(torch.randn(3, 4)).shape == (3, 2)
    assert not isinstance(model, transformers.PreTrainedModel)


def test_a_shared_module_is_wrapped_under_all_its_names() -> None:
    shared = nn.Linear(4, 4)
    base = nn.ModuleDict({"one": shared, "two": shared})
    model = fl.get_peft_model(base, fl.LoraConfig(target_modules=["one"]))
    assert model.get_base_model()["one"] is model.get_base_model()["two"]


# -- what goes to the base ---------------------------------------------------------------------------------------------


def test_unknown_attributes_come_from_the_base() -> None:
    model = adapted()
    base = model.get_base_model()
    assert model.config is base.config
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.generation_config is base.generation_config
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


def test_generate_uses_the_adapters() -> None:
    model, ids = adapted(), models.token_ids()
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(answer[:, 6], logits(model)[:, -1].argmax(-1))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = adapted().train()
        if checkpointed:
            enable_checkpointing(model, {"use_reentrant": False})
        model(input_ids=models.token_ids(), labels=models.token_ids()).loss.backward()
        assert is_checkpointing(model) is checkpointed
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_reentrant_checkpointing_of_a_base_that_had_it_on_trains_too() -> None:
    base = fl.prepare_model_for_kbit_training(models.llama(), gradient_checkpointing_kwargs={"use_reentrant": True})
    model = fl.get_peft_model(base, config()).train()
    model(input_ids=models.token_ids(), labels=models.token_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_copies_and_pickles_answer_as_the_original() -> None:
    model = adapted(task_type="CAUSAL_LM")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(logits(other), logits(model))


# -- several adapters --------------------------------------------------------------------------------------------------


def test_a_second_adapter_is_inactive_and_frozen_until_it_is_set() -> None:
    model = adapted()
    before = logits(model)
    model.add_adapter("second", config(r=2, target_modules=["down_proj"]))
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
    model.set_adapter("second")
    assert model.active_adapter == "second"
    assert all(p.requires_grad == ("second" in name) for name, p in model.named_parameters())
    assert not torch.equal(logits(model), before)


def test_a_frozen_model_stays_frozen_when_an_adapter_is_added() -> None:
    model = adapted()
    model.set_adapter("default", inference_mode=True)
    model.add_adapter("second", config())
    assert not any(p.requires_grad for p in model.parameters())


def test_a_list_of_adapters_is_their_sum() -> None:
    model = adapted(target_modules=["lm_head"])
    model.add_adapter("second", config(target_modules=["lm_head"]))
    with model.disable_adapter():
        base = logits(model)
    parts = []
    for name in ("default", "second"):
        model.set_adapter(name)
        parts.append(logits(model) - base)
    model.set_adapter(["default", "second"])
    # the head is linear; three float32 roundings of logits of order 1
    torch.testing.assert_close(logits(model), base + parts[0] + parts[1], atol=1e-6, rtol=0)


def test_deleting_the_active_adapter_makes_the_first_other_one_active() -> None:
    model = adapted()
    model.add_adapter("second", config())
    model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert not any("default" in name for name, _ in model.named_parameters())
    model.delete_adapter("second")
    assert model.active_adapters == []


@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter"])
def test_an_unknown_adapter_is_refused_with_the_names_there_are(call: str) -> None:
    with pytest.raises(fl.TargetError, match=r"no adapter 'nobody'; it has \['default'\]"):
        getattr(adapted(), call)("nobody")


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(fl.TargetError, match="has an adapter 'default' already"):
        adapted().add_adapter("default", config())


def test_an_adapter_that_trains_biases_must_be_the_only_one() -> None:
    model = fl.get_peft_model(models.bert_classifier(), fl.LoraConfig(target_modules=["query"], bias="all"))
    with pytest.raises(fl.UnsupportedError, match="must be the only one"):
        model.add_adapter("second", fl.LoraConfig(target_modules=["query"]))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "norm"]},  # a type that LoRA does not adapt
        {"target_modules": ["q_proj", "embed_tokens"], "lora_bias": True},  # refused by the embedding only
        {"target_modules": ["o_proj"], "modules_to_save": ["q_proj"]},  # adapted by the first adapter
    ],
)
def test_a_failed_addition_leaves_the_model_as_it_was(options: dict[str, Any]) -> None:
    model = adapted()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(fl.FerroloraError):
        model.add_adapter("second", config(**options))
    assert [name for name, _ in model.named_modules()] == before
    assert list(model.peft_config) == ["default"]


def test_disabling_gives_the_base_and_enabling_the_adapter_again() -> None:
    base = models.llama()
    expected = logits(base)
    model = fl.get_peft_model(base, config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    before = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)


def test_disabling_with_trained_biases_warns() -> None:
    model = fl.get_peft_model(models.bert_classifier(), fl.LoraConfig(target_modules=["query"], bias="lora_only"))
    with pytest.warns(UserWarning, match="biases were trained"), model.disable_adapter():
        pass


# -- counting ----------------------------------------------------------------------------------------------------------


def test_trainable_parameters_are_printed_as_documented(capsys: pytest.CaptureFixture[str]) -> None:
    adapted().print_trainable_parameters()
    # q and v of two layers: 4·(32+32) + 4·(32+16) a layer; 18848 in the base
    assert capsys.readouterr().out == "trainable params: 896 || all params: 20512 || trainable%: 4.3682\n"


def test_mt5_large_counts_are_those_of_the_published_example() -> None:
    sizes = {"vocab_size": 250112, "d_model": 1024, "d_ff": 2816, "num_layers": 24, "num_heads": 16, "d_kv": 64}
    mt5 = transformers.MT5Config(**sizes, num_decoder_layers=24, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        base = transformers.AutoModelForSeq2SeqLM.from_config(mt5)
        # the published figure is older than transformers 5, which ties the head of every mT5 to its embedding
        base.lm_head.weight = nn.Parameter(torch.empty_like(base.lm_head.weight))
        model = fl.get_peft_model(base, fl.LoraConfig(r=8, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    assert model.get_nb_trainable_parameters() == (2359296, 1231940608)


# -- files -------------------------------------------------------------------------------------------------------------


def test_an_adapter_comes_back_with_the_same_logits(tmp_path: Path) -> None:
    base = models.llama()
    model = fl.get_peft_model(copy.deepcopy(base), config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = fl.PeftModel.from_pretrained(base, tmp_path)
    assert isinstance(loaded, fl.PeftModelForCausalLM)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training


def test_a_trainable_load_trains_the_adapter_alone(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    loaded = fl.PeftModel.from_pretrained(models.llama(), tmp_path, is_trainable=True)
    assert {"lora_" in name for name, p in loaded.named_parameters() if p.requires_grad} == {True}


def test_no_target_is_written_out_as_names(tmp_path: Path) -> None:
    fl.get_peft_model(models.llama(), fl.LoraConfig()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert saved["inference_mode"] is True
    assert saved["auto_mapping"] == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }


def test_adapters_with_other_names_lie_in_subfolders_and_no_key_names_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted()
    model.add_adapter("second", config(target_modules=["o_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "second/adapter_model.safetensors").is_file()
    keys = fl.get_peft_model_state_dict(model, adapter_name="second")
    assert keys
    assert not any("second" in key or "default" in key for key in keys)
    torch.manual_seed(0)  # the same base again
    other = adapted()
    other.load_adapter(tmp_path / "second", "renamed")
    model.set_adapter("second")
    other.set_adapter("renamed")
    assert torch.equal(logits(other), logits(model))


def test_selected_adapters_only_are_saved(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("second", config())
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    assert [path.name for path in tmp_path.iterdir()] == ["second"]


def test_an_adapter_for_another_rank_is_refused_with_both_shapes(tmp_path: Path) -> None:
    adapted(r=4).save_pretrained(tmp_path)
    with pytest.raises(fl.ShapeError, match=r"the file has \[4, 32\], adapter 'default' of this model has \[2, 32\]"):
        adapted(r=2).load_adapter(tmp_path, "default")


def test_tensors_that_are_missing_or_have_no_place_are_refused(tmp_path: Path) -> None:
    adapted(target_modules=["q_proj", "k_proj"]).save_pretrained(tmp_path)
    with pytest.raises(fl.FormatError, match=r"lacks 4 tensors.*v_proj"):
        adapted(target_modules=["q_proj", "k_proj", "v_proj"]).load_adapter(tmp_path, "default")
    with pytest.raises(fl.FormatError, match=r"holds 4 tensors.*q_proj"):
        adapted(target_modules=["k_proj"]).load_adapter(tmp_path, "default")


def test_embeddings_are_saved_and_read_back_when_asked_for(tmp_path: Path) -> None:
    base = models.llama()
    model = fl.get_peft_model(copy.deepcopy(base), config())
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert torch.equal(logits(fl.PeftModel.from_pretrained(base, tmp_path)), logits(model))


def test_resized_embeddings_are_saved_unasked(tmp_path: Path) -> None:
    models.llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not any("embed" in key for key in fl.get_peft_model_state_dict(fl.get_peft_model(base, config())))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(models.VOCABULARY + 3, mean_resizing=False)
    keys = fl.get_peft_model_state_dict(fl.get_peft_model(base, config()))
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= keys.keys()


def test_auto_model_loads_the_base_that_the_adapter_names(tmp_path: Path) -> None:
    models.llama().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for task in ("CAUSAL_LM", None):
        model = fl.get_peft_model(copy.deepcopy(base), config(task_type=task))
        model.save_pretrained(tmp_path / "adapter")
        for auto in (fl.AutoPeftModelForCausalLM, fl.AutoPeftModel):
            assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter")), logits(model))


def test_auto_model_says_when_the_adapter_names_no_base(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    with pytest.raises(fl.FormatError, match="names no base_model_name_or_path"):
        fl.AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_push_to_hub_uploads_an_adapter_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    def upload(directory: Path, repo_id: str, **options: Any) -> str:
        uploaded.update(options, repo=repo_id, files=sorted(path.name for path in directory.iterdir()))
        return "url"

    monkeypatch.setattr("ferrolora.io.hub.upload_directory", upload)
    assert adapted().push_to_hub("me/adapter", private=True) == "url"
    assert uploaded == {
        "private": True,
        "repo": "me/adapter",
        "files": ["README.md", "adapter_config.json", "adapter_model.safetensors"],
    }
