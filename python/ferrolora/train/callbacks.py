"""What watches a training run: the record of its figures and the caller's progress report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
