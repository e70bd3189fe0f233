"""`fit` trains, saves, resumes and reports; the figures it gives are those of the run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import EvalPrediction

import ferrolora as fl
from ferrolora.errors import FormatError
from ferrolora.nn import QuantLinear
from ferrolora.train.loop import CHECKPOINTS, TrainSettings, accuracy, fit, newest_checkpoint
from ferrolora.train.memory import base_memory
from ferrolora.train.report import plot_loss
from ferrolora.train.tokenize import PadCollator, TokenizedData
from tiny.models import bert_classifier, llama

SETTINGS = TrainSettings(epochs=2, batch_size=4, learning_rate=1e-2, log_every=1, save_every=3)


def classifier() -> fl.PeftModel:
    torch.manual_seed(0)
    base = bert_classifier()
    fl.quantize_model(base, fl.QuantSpec(), skip_modules=["classifier"])
    config = fl.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="SEQ_CLS")
    return fl.get_peft_model(base, config)


def examples(count: int = 16) -> TokenizedData:
    """The class is the first token, so there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 64, (3 + i % 4,), generator=generator).tolist() for i in range(count)]
    return TokenizedData([{"input_ids": [i % 3, *row], "labels": i % 3} for i, row in enumerate(rows)])


def test_training_lowers_the_loss_and_leaves_an_adapter_that_peft_can_read(tmp_path: Path) -> None:
    model = classifier()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    result = fit(model, examples(), PadCollator(0), tmp_path, SETTINGS, examples(6), accuracy)
    steps, losses = result.losses()
    assert steps == list(range(1, 9))
    assert losses[-1] < losses[0]
    assert 0.0 <= result.metrics["eval_accuracy"] <= 1.0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert any("lora_A" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = fit(classifier(), examples(), PadCollator(0), tmp_path / "whole", SETTINGS)
    started = tmp_path / "part" / CHECKPOINTS
    started.mkdir(parents=True)
    (tmp_path / "whole" / CHECKPOINTS / "checkpoint-6").rename(started / "checkpoint-6")
    resumed = fit(classifier(), examples(), PadCollator(0), tmp_path / "part", SETTINGS, resume=True)
    assert resumed.losses() == whole.losses()
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_progress_is_reported_step_by_step_with_the_latest_loss(tmp_path: Path) -> None:
    seen: list[tuple[int, int, float | None]] = []
    settings = TrainSettings(max_steps=2, batch_size=4, log_every=1)
    fit(
        classifier(),
        examples(),
        PadCollator(0),
        tmp_path,
        settings,
        report=lambda done, total, figures: seen.append((done, total, figures.get("loss"))),
    )
    assert seen[0] == (0, 2, None)
    assert {done for done, _, _ in seen} == {0, 1, 2}
    assert all(total == 2 for _, total, _ in seen)
    assert seen[-1][2] is not None


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no checkpoint to resume from"):
        newest_checkpoint(tmp_path)


def test_the_newest_checkpoint_is_the_one_with_most_steps(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        (tmp_path / CHECKPOINTS / f"checkpoint-{step}").mkdir(parents=True)
    assert newest_checkpoint(tmp_path).name == "checkpoint-100"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"warmup": 1.0}, "warmup"),
        ({"save_every": -1}, "save_every"),
    ],
)
def test_a_setting_no_run_can_use_is_named(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**wrong)


def test_accuracy_is_the_share_of_right_answers_whatever_else_the_model_returns() -> None:
    logits, labels = torch.eye(4).numpy(), torch.tensor([0, 1, 2, 0]).numpy()
    assert accuracy(EvalPrediction(logits, labels)) == {"accuracy": 0.75}
    assert accuracy(EvalPrediction((logits, logits), labels)) == {"accuracy": 0.75}


def test_the_loss_curve_is_a_picture(tmp_path: Path) -> None:
    settings = TrainSettings(max_steps=2, batch_size=4, log_every=1)
    result = fit(classifier(), examples(), PadCollator(0), tmp_path, settings, examples(6))
    plot_loss(result, tmp_path / "loss.png", "a title")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_memory_counts_every_tensor_before_and_after_quantization() -> None:
    model = llama()
    whole = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert (base_memory(model).before, base_memory(model).after) == (whole, whole)
    fl.quantize_model(model, fl.QuantSpec(), skip_modules=["lm_head"])
    memory = base_memory(model)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert memory.linear_parameters == sum(layer.in_features * layer.out_features for layer in layers)
    assert memory.linear_before == 4 * memory.linear_parameters
    assert memory.linear_after == sum(layer.quant_tensor().nbytes for layer in layers)
    assert memory.before == whole
    assert memory.after == whole - memory.linear_before + memory.linear_after
    assert 4.0 < memory.bits_per_parameter < 4.5


def test_a_tensor_that_two_modules_share_counts_once() -> None:
    tied = nn.ModuleList([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)])
    tied[1].weight = tied[0].weight
    assert base_memory(tied).after == 64
