"""Train an adapter: settings, the run over the Transformers Trainer, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Dataset

from ferrolora.errors import FormatError

if TYPE_CHECKING:
    from transformers import EvalPrediction

    from ferrolora.model.peft_model import PeftModel
    from ferrolora.train.callbacks import Progress

CHECKPOINTS = "checkpoints"  # folder of the output directory that holds the states a run resumes from


@dataclass(frozen=True)
class TrainSettings:
    """How long, how fast and in what portions to train.

    Args:
        epochs: passes over the data; default 3.
        max_steps: optimizer steps at most; -1 (default) leaves the end to `epochs`.
        batch_size: examples in one forward pass; default 16.
        gradient_accumulation: forward passes in one optimizer step; default 1.
        learning_rate: peak rate of AdamW; default 2e-4 (QLoRA, arXiv 2305.14314, table 9).
        scheduler: shape of the rate after warm-up, a name that transformers knows; default "linear".
        warmup: share of the steps over which the rate rises from 0; default 0.03.
        weight_decay: of AdamW; default 0.
        max_grad_norm: gradients are scaled down to this 2-norm; default 1.0.
        log_every: steps between logged losses; default 10.
        save_every: steps between checkpoints to resume from; 0 (default) saves once an epoch.
        seed: of data order, dropout and new weights; default 42.

    Raises:
        ValueError: a value that no run can use; names the setting.
    """

    epochs: float = 3.0
    max_steps: int = -1
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 2e-4
    scheduler: str = "linear"
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    log_every: int = 10
    save_every: int = 0
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation", "learning_rate", "log_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup is a share of the steps between 0 and 1, got {self.warmup}")
        if self.save_every < 0:
            raise ValueError(f"save_every must be 0 or more, got {self.save_every}")


@dataclass(frozen=True)
class TrainResult:
    """What a run found.

    Attributes:
        steps: optimizer steps done, those before a resume included.
        history: one dict a logged moment (`step`, `epoch`, `loss`, `learning_rate`, `grad_norm` or `eval_…`).
        metrics: the figures of the last evaluation (`eval_loss`, `eval_accuracy`), empty without evaluation data.
        seconds: duration of the training loop since its start or resume.
    """

    steps: int
    history: list[dict[str, float]]
    metrics: dict[str, float]
    seconds: float

    def losses(self) -> tuple[list[int], list[float]]:
        """Steps and training losses at the logged moments."""
        logged = [entry for entry in self.history if "loss" in entry]
        return [int(entry["step"]) for entry in logged], [entry["loss"] for entry in logged]


def fit(
    model: PeftModel,
    train_data: Dataset[Any],
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    output: Path,
    settings: TrainSettings | None = None,
    eval_data: Dataset[Any] | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
    report: Progress | None = None,
    resume: bool = False,
) -> TrainResult:
    """Train the adapter of `model` and save it in `output`, with checkpoints under `output/checkpoints`.

    Args:
        model: a PeftModel; its trainable parameters are updated in place.
        train_data: examples that `collate` makes batches of; they have `input_ids`.
        collate: examples to a batch of tensors with `labels`.
        output: directory for `adapter_config.json` and `adapter_model.safetensors`.
        settings: default `TrainSettings()`.
        eval_data: evaluated after each epoch; none by default.
        compute_metrics: turns predictions into figures besides the loss, for instance `accuracy`.
        report: called with steps done, steps in all and the latest figures.
        resume: go on from the newest checkpoint; the losses are those of a run that was never interrupted.

    Returns: the record of the run.

    Raises:
        FormatError: `resume` without a checkpoint.
    """
    from transformers import PrinterCallback

    from ferrolora.train.callbacks import ProgressReport
    from ferrolora.train.sampler import LengthGroupedTrainer

    settings = settings if settings is not None else TrainSettings()
    checkpoint = newest_checkpoint(output) if resume else None
    trainer = LengthGroupedTrainer(
        model,
        args=_arguments(model, output, settings, evaluates=eval_data is not None, loss_only=compute_metrics is None),
        data_collator=collate,
        train_dataset=train_data,
        eval_dataset=eval_data,
        compute_metrics=compute_metrics,
        callbacks=[ProgressReport(report)] if report is not None else [],
    )
    trainer.remove_callback(PrinterCallback)  # it writes to standard output, which belongs to the caller
    outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model.save_pretrained(str(output))
    history = [dict(entry) for entry in trainer.state.log_history]
    evaluations = [entry for entry in history if "eval_loss" in entry]
    metrics = {k: v for k, v in evaluations[-1].items() if k.startswith("eval_")} if evaluations else {}
    return TrainResult(trainer.state.global_step, history, metrics, float(outcome.metrics["train_runtime"]))


def newest_checkpoint(output: Path) -> Path:
    """The checkpoint with the most steps under `output`.

    Raises:
        FormatError: there is none.
    """
    folder = output / CHECKPOINTS
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    if not found:
        raise FormatError(f"{folder}: holds no checkpoint to resume from")
    return found[-1]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of examples whose largest logit is at the label: `logits [N, C]`, `labels [N]` to one figure."""
    outputs = prediction.predictions
    logits = outputs[0] if isinstance(outputs, tuple) else outputs  # some models return more than logits
    chosen = logits.argmax(axis=-1)
    return {"accuracy": float((chosen == prediction.label_ids).mean())}


def _arguments(model: PeftModel, output: Path, settings: TrainSettings, evaluates: bool, loss_only: bool) -> Any:
    from transformers import TrainingArguments

    on_cpu = next(model.parameters()).device.type == "cpu"
    return TrainingArguments(
        output_dir=str(output / CHECKPOINTS),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # a loss that is not finite must show
        eval_strategy="epoch" if evaluates else "no",
        prediction_loss_only=loss_only,
        save_strategy="steps" if settings.save_every else "epoch",
        save_steps=settings.save_every or 500,
        save_total_limit=2,
        seed=settings.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=not on_cpu,
        use_cpu=on_cpu,  # the Trainer would otherwise move a CPU model to any GPU it sees
        report_to="none",
        disable_tqdm=True,
    )
