"""Multitask prompt tuning: a shared prompt, modified for each task by a low-rank factor."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ferrolora.adapters.config import PeftType
from ferrolora.adapters.prompt import PromptEmbedding, PromptTuningConfig
from ferrolora.adapters.prompt_base import FILE_KEY, PromptEncoder, PromptLearningConfig, PromptStart, fill, needed
from ferrolora.errors import FormatError, UnsupportedError

_FROM_SOURCE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
STARTS = ("RANDOM", "TEXT", *_FROM_SOURCE)


@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """P_task = P_shared ⊙ (cols[task]·rows[task]); every batch brings `task_ids` [batch].

    Args:
        num_tasks: tasks that are trained together. Default 1.
        num_ranks: rank of a task's factor: cols [tasks, n, ranks], rows [tasks, ranks, dim]. Default 1.
        prompt_tuning_init: "RANDOM" (default) or "TEXT" for the source stage; for the target stage
            "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK" or "ONLY_SOURCE_SHARED".
        prompt_tuning_init_state_dict_path: the source's adapter_model.safetensors, for the target stage.
        prompt_tuning_init_task: which source task, for "EXACT_SOURCE_TASK". Default 0.

    The other fields are those of `PromptTuningConfig`.

    Raises:
        UnsupportedError: a target stage without a source or with several tasks.

    Source: arXiv 2303.02861.
    """

    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    takes_task_ids: ClassVar[bool] = True

    def __post_init__(self) -> None:
        start, self.prompt_tuning_init = self.prompt_tuning_init, "RANDOM"
        super().__post_init__()
        self.prompt_tuning_init = start
        self.peft_type = PeftType.MULTITASK_PROMPT_TUNING
        self.check_start(STARTS)
        if self.num_ranks < 1 or self.num_tasks < 1:
            raise UnsupportedError("MultitaskPromptTuningConfig: num_ranks and num_tasks must be at least 1")
        if self.prompt_tuning_init in _FROM_SOURCE and not self.prompt_tuning_init_state_dict_path:
            raise UnsupportedError(
                f"MultitaskPromptTuningConfig: {self.prompt_tuning_init!r} needs prompt_tuning_init_state_dict_path"
            )
        if self.prompt_tuning_init in _FROM_SOURCE[:2] and self.num_tasks != 1:
            raise UnsupportedError(f"MultitaskPromptTuningConfig: {self.prompt_tuning_init!r} is for num_tasks=1")


class MultitaskPromptEmbedding(PromptEncoder):
    """`embedding.weight` [n, dim], `prefix_task_cols` [tasks, n, ranks] and `prefix_task_rows` [tasks, ranks, dim]."""

    def __init__(self, config: PromptLearningConfig, start: PromptStart) -> None:
        super().__init__()
        assert isinstance(config, MultitaskPromptTuningConfig)
        count, dim = config.sizes()
        self.embedding = PromptEmbedding(config, start).embedding
        self.prefix_task_cols = nn.Parameter(0.02 * torch.randn(config.num_tasks, count, config.num_ranks))
        self.prefix_task_rows = nn.Parameter(0.02 * torch.randn(config.num_tasks, config.num_ranks, dim))
        if config.prompt_tuning_init in _FROM_SOURCE and not config.inference_mode:
            self._start_from(config, start.source)

    def forward(self, task_ids: Tensor | None = None) -> Tensor:
        """[batch, n, dim] for `task_ids` [batch]."""
        if task_ids is None:
            raise UnsupportedError("multitask prompt tuning needs task_ids [batch] in every batch")
        factors: Tensor = self.prefix_task_cols[task_ids] @ self.prefix_task_rows[task_ids]
        return self.embedding.weight * factors

    def to_file(self) -> dict[str, Tensor]:
        return {
            FILE_KEY: self.embedding.weight.detach(),
            "prefix_task_cols": self.prefix_task_cols.detach(),
            "prefix_task_rows": self.prefix_task_rows.detach(),
        }

    def from_file(self, tensors: Mapping[str, Tensor]) -> None:
        fill(self.embedding.weight, needed(tensors, FILE_KEY), FILE_KEY)
        fill(self.prefix_task_cols, needed(tensors, "prefix_task_cols"), "prefix_task_cols")
        fill(self.prefix_task_rows, needed(tensors, "prefix_task_rows"), "prefix_task_rows")

    def _start_from(self, config: MultitaskPromptTuningConfig, source: Mapping[str, Tensor] | None) -> None:
        if source is None:
            raise FormatError("multitask prompt tuning: the source adapter was not read")
        fill(self.embedding.weight, needed(source, FILE_KEY), FILE_KEY)
        if config.prompt_tuning_init == "ONLY_SOURCE_SHARED":
            return
        for key in ("prefix_task_cols", "prefix_task_rows"):
            tasks = needed(source, key)
            if config.prompt_tuning_init == "EXACT_SOURCE_TASK":
                task = config.prompt_tuning_init_task
                if not 0 <= task < tasks.shape[0]:
                    raise FormatError(f"prompt_tuning_init_task={task}: the source has {tasks.shape[0]} tasks")
                chosen = tasks[task][None]
            else:
                chosen = tasks.mean(0, keepdim=True)
            fill(getattr(self, key), chosen, key)
