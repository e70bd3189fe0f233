"""The Transformers Trainer with checkpoints that hold the adapter alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from ferrolora.model.peft_model import PeftModel


class AdapterTrainer(Trainer):  # type: ignore[misc]  # transformers ships no types
    """`transformers.Trainer` for a ferrolora `PeftModel`: a checkpoint is the adapter, megabytes instead of the model.

    The plain Trainer also works, but writes the whole base into each checkpoint, since it knows no PeftModel other
    than PEFT's own. Arguments are those of `transformers.Trainer`.

    Raises:
        TypeError: the model is not a ferrolora PeftModel.
    """

    def __init__(self, model: PeftModel, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(f"AdapterTrainer trains a ferrolora PeftModel, got {type(model).__name__}")
        super().__init__(model, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        directory = output_dir if output_dir is not None else self.args.output_dir
        os.makedirs(directory, exist_ok=True)
        self.model.save_pretrained(directory)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        torch.save(self.args, os.path.join(directory, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        target = self.model if model is None else model
        target.load_adapter(resume_from_checkpoint, target.active_adapter, is_trainable=True)
