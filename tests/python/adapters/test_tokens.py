"""Trained rows of an embedding."""

from pathlib import Path

import pytest
import torch

import ferrolora as fl
from tiny import models


def model(indices: object = (2, 5)) -> fl.PeftModel:
    return fl.get_peft_model(models.llama(), fl.LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices))


def test_only_the_chosen_rows_are_trained_and_saved(tmp_path: Path) -> None:
    adapted = model([2, 4])
    adapted(input_ids=models.token_ids(), labels=models.token_ids()).loss.backward()
    rows = dict(adapted.named_parameters())[
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    ]
    assert rows.shape == (2, 32)
    assert rows.grad is not None
    assert bool((rows.grad.abs().sum(1) > 0).all())
    adapted.save_pretrained(tmp_path)
    keys = fl.get_peft_model_state_dict(adapted)
    assert "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta" in keys


def test_a_tied_head_sees_the_trained_rows() -> None:
    base = models.gpt2()
    adapted = fl.get_peft_model(base, fl.LoraConfig(target_modules=["c_attn"], trainable_token_indices=[3])).eval()
    before = models.logits(adapted)
    name = "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta.default"
    with torch.no_grad():
        dict(adapted.named_parameters())[name].mul_(2)
    after = models.logits(adapted)
    # row 1 holds no token 3, so only the logit of token 3 changes there: it doubles
    torch.testing.assert_close(after[1, :, 3], 2 * before[1, :, 3], atol=1e-5, rtol=0)
    others = [i for i in range(64) if i != 3]
    assert torch.equal(after[1][:, others], before[1][:, others])
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(models.logits(merged), after, atol=1e-5, rtol=0)


@pytest.mark.parametrize("indices", [[64], [-1], [1, 1]])
def test_ids_outside_the_vocabulary_or_twice_are_refused(indices: list[int]) -> None:
    with pytest.raises(fl.TargetError, match="different ids below 64"):
        model(indices)


def test_an_embedding_cannot_be_a_target_and_have_trained_rows() -> None:
    with pytest.raises(fl.TargetError, match="neither adapted nor"):
        fl.get_peft_model(models.llama(), fl.LoraConfig(target_modules=["embed_tokens"], trainable_token_indices=[1]))


def test_two_adapters_with_rows_cannot_be_active_together() -> None:
    adapted = model()
    adapted.add_adapter("b", fl.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[7]))
    adapted.set_adapter("b")
    with pytest.raises(fl.UnsupportedError, match="activate one"):
        adapted.set_adapter(["default", "b"])
