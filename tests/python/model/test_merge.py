"""Merging adapters into float bases, undoing it, and leaving them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ferrolora as fl
from tiny import models
from tiny.models import logits


def config(**options: Any) -> fl.LoraConfig:
    return fl.LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options))


def adapted(**options: Any) -> fl.PeftModel:
    return fl.get_peft_model(models.llama(), config(**options))


@pytest.mark.parametrize("maker", [models.llama, models.gpt2])
def test_a_merged_model_answers_as_the_adapted_one(maker: Any) -> None:
    model = fl.get_peft_model(maker(), fl.LoraConfig(init_lora_weights=False))
    before = logits(model)
    with model.disable_adapter():
        distance = (logits(model) - before).abs().max()
    merged = model.merge_and_unload()
    assert type(merged) is type(maker())
    # Merging re-associates (W + sBA)x for Wx + sBAx: a few roundings of 2^-24 of values of order 1 a layer
    torch.testing.assert_close(logits(merged), before, atol=1e-5, rtol=0)
    assert distance > 1e-2


def test_merge_and_unmerge_restore_every_parameter_bit_for_bit() -> None:
    model = adapted()
    before, state = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_disabling_a_merged_model_gives_the_base_and_merges_again() -> None:
    base = models.llama()
    expected = logits(base)
    model = fl.get_peft_model(base, config())
    model.merge_adapter()
    merged = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), merged)


def test_what_would_make_a_merge_stale_is_refused(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    model.add_adapter("second", config())
    model.merge_adapter()
    for change in (
        lambda: model.set_adapter("second"),
        lambda: model.load_adapter(tmp_path, "default"),
        lambda: model.add_adapter("third", config()),
        lambda: model.delete_adapter("default"),
    ):
        with pytest.raises(fl.UnsupportedError, match=r"unmerge_adapter\(\)"):
            change()
    model.unmerge_adapter()
    model.set_adapter("second")


def test_unload_gives_back_the_very_base() -> None:
    base = models.llama()
    expected = copy.deepcopy(base)
    restored = fl.get_peft_model(base, config(modules_to_save=["lm_head"])).unload()
    assert restored is base
    assert str(restored) == str(expected)
    assert torch.equal(logits(restored), logits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_merge_can_be_asked_for_in_16_or_32_bits(dtype: torch.dtype) -> None:
    merged = adapted().merge_and_unload(dtype=dtype)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert logits(merged).dtype == dtype


def test_a_merge_into_8_bits_is_refused() -> None:
    with pytest.raises(fl.UnsupportedError, match=r"dtype=torch\.int8"):
        adapted().merge_and_unload(dtype=torch.int8)


def test_trained_modules_take_the_place_of_the_originals_in_a_merge() -> None:
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    before = logits(model)
    merged = model.merge_and_unload()
    assert type(merged.lm_head) is nn.Linear
    # the head sums 32 terms of order 1 over a hidden state that merging changed by a few roundings
    torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=0)


def test_a_merge_into_a_tied_head_is_not_tied_again_on_loading(tmp_path: Path) -> None:
    model = fl.get_peft_model(models.llama(tie_word_embeddings=True), config(target_modules=["lm_head"]))
    embedding = model.get_input_embeddings().weight.detach().clone()
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))
