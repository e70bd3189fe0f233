"""AdaLoRA under transformers' Trainer."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import ferrolora as fl
from ferrolora.train.callbacks import AdaLoraCallback
from tiny import models
from tiny.text import questions


def trainer(steps: int, planned: int, directory: Path) -> tuple[fl.PeftModel, Trainer]:
    config = fl.AdaLoraConfig(target_modules=["q_proj", "v_proj"], init_r=4, target_r=2, total_step=planned, tinit=1)
    model = fl.get_peft_model(models.llama(), config)
    rows = [{"input_ids": ids, "labels": ids} for ids in questions(8)]
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return model, Trainer(model, arguments, train_dataset=rows, callbacks=[AdaLoraCallback()])


def test_the_callback_prunes_to_the_target_while_the_gradients_are_there(tmp_path: Path) -> None:
    model, run = trainer(6, 6, tmp_path)
    run.train()
    kept = sum(int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name)
    assert kept == 2 * 4
    pattern = model.peft_config["default"].rank_pattern
    assert sum(sum(mask) for mask in pattern.values()) == 2 * 4
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_run_of_another_length_than_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fl.UnsupportedError, match="total_step=9, the run has 6 steps"):
        trainer(6, 9, tmp_path)[1].train()
