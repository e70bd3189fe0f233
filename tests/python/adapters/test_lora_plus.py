"""LoRA+ parameter groups."""

import pytest
import torch

import ferrolora as fl
from tiny import models


def test_b_learns_faster_by_the_ratio_and_every_trained_parameter_is_in_one_group() -> None:
    model = fl.get_peft_model(
        models.llama(), fl.LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    )
    groups = fl.lora_plus_groups(model, lr=1e-3, lr_ratio=8, weight_decay=0.1, embedding_lr=1e-5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    names = {name: rate[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(rate) == len(names) == sum(len(group["params"]) for group in groups)
    for name, value in names.items():
        assert value == (8e-3 if "lora_B" in name else 1e-5 if "lora_embedding" in name else 1e-3)
    torch.optim.AdamW(groups).step()


def test_nothing_to_train_or_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(fl.UnsupportedError, match="no trainable"):
        fl.lora_plus_groups(models.llama().requires_grad_(False), lr=1e-3)
    with pytest.raises(fl.UnsupportedError, match="lr=0"):
        fl.lora_plus_groups(models.llama(), lr=0)
