"""What `transformers.Trainer` needs of a model: it trains, checkpoints, resumes and saves adapters, with no help."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

import ferrolora as fl
from tiny import models

EXAMPLES = [{"input_ids": row, "labels": row} for row in torch.arange(32).view(8, 4)]


def trainer(directory: Path, steps: int, quantized: bool, **options: Any) -> Trainer:
    torch.manual_seed(0)
    base = models.llama()
    if quantized:
        fl.quantize_model(base)
        base.is_quantized = True  # as a model has it that transformers loaded with a quantization_config
    config = fl.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1, modules_to_save=["lm_head"])
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        **options,
    )
    return Trainer(fl.get_peft_model(base, config), arguments, train_dataset=EXAMPLES, eval_dataset=EXAMPLES[:2])


def adapter(made: Trainer) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in made.model.get_adapter_state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_run_ended(tmp_path: Path, quantized: bool) -> None:
    whole = trainer(tmp_path / "whole", 4, quantized)
    whole.train()
    resumed = trainer(tmp_path / "resumed", 4, quantized)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    expected, reached = adapter(whole), adapter(resumed)
    assert all(torch.equal(reached[key], expected[key]) for key in expected)


def test_a_saved_model_is_an_adapter_directory_and_nothing_else(tmp_path: Path) -> None:
    made = trainer(tmp_path, 1, quantized=True)
    made.train()
    made.save_model(str(tmp_path / "final"))
    assert {path.name for path in (tmp_path / "final").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "training_args.bin",
    }


def test_a_checkpoint_holds_adapters_only_under_their_names_in_memory(tmp_path: Path) -> None:
    made = trainer(tmp_path, 2, quantized=True)
    made.model.add_adapter("second", fl.LoraConfig(target_modules=["o_proj"]))
    made.train()
    with safe_open(tmp_path / "checkpoint-2/model.safetensors", "pt") as file:
        keys = set(file.keys())
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained <= keys
    assert all(".default." in key or ".second." in key for key in keys)


@pytest.mark.slow
def test_the_best_checkpoint_comes_back_at_the_end(tmp_path: Path) -> None:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    made = trainer(tmp_path, 4, quantized=True, greater_is_better=True, **options)  # so that the worst, the first, wins
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    expected = fl.PeftModel.from_pretrained(models.llama(), tmp_path / "checkpoint-2").get_adapter_state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in adapter(made).items())


def test_trainer_sees_the_bases_columns_labels_and_loss(tmp_path: Path) -> None:
    made = trainer(tmp_path, 1, quantized=False)
    assert made.label_names == ["labels"]
    assert made.model_accepts_loss_kwargs
    assert made._loss_shifts_labels
    made._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "labels"} <= set(made._signature_columns)
