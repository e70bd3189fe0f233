"""What watches a training run: the record of its figures and the caller's progress report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ferrolora.errors import UnsupportedError

Progress = Callable[[int, int, dict[str, float]], None]  # (steps done, steps in all, latest figures)


class ProgressReport(TrainerCallback):
    """Calls `report(done, total, figures)` after every step and every logged figure.

    Args:
        report: receives the optimizer steps done, those in all, and the latest figures by name (`loss`, `eval_loss`…).
    """

    def __init__(self, report: Progress) -> None:
        self._report = report
        self._latest: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report(state.global_step, state.max_steps, self._latest)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._report(state.global_step, state.max_steps, self._latest)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self._latest.update(logs or {})
        self._report(state.global_step, state.max_steps, self._latest)


class AdaLoraCallback(TrainerCallback):
    """Moves the ranks of AdaLoRA adapters after each optimizer step, while its gradients are still there.

    Raises:
        UnsupportedError: at the start, if an adapter was configured for another number of steps than the run has.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        for name in model.active_adapters:
            planned = getattr(model.peft_config[name], "total_step", None)
            if planned is not None and planned != state.max_steps:
                raise UnsupportedError(
                    f"adapter {name!r} was configured with total_step={planned}, the run has {state.max_steps} steps"
                )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        model.update_and_allocate(state.global_step + 1)  # Trainer counts the step after this event
