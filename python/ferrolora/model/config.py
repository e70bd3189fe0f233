"""An adapter configuration made concrete for one model."""

import copy
from typing import Any, TypeVar

from torch import nn

from ferrolora.adapters.config import ModuleConfig, PeftConfig, TaskType
from ferrolora.adapters.ia3 import IA3Config
from ferrolora.adapters.prompt_base import PromptLearningConfig
from ferrolora.model.ia3_targets import fill_targets
from ferrolora.model.origin import name_or_path
from ferrolora.model.prompt_sizes import fill_sizes
from ferrolora.model.targets import TASK_HEADS

ConfigT = TypeVar("ConfigT", bound=PeftConfig)


def config_for(model: nn.Module, config: ConfigT) -> ConfigT:
    """A copy of `config` with what the model settles: where the base came from, and the heads its task trains.

    Args:
        model: the base model; the directory or repository it came from is recorded.
        config: the caller's configuration, left as it is.
    """
    concrete = copy.deepcopy(config)
    if concrete.base_model_name_or_path is None:
        concrete.base_model_name_or_path = name_or_path(model)
    if isinstance(concrete, IA3Config):
        fill_targets(model, concrete)
    heads = TASK_HEADS.get(TaskType(concrete.task_type), ()) if concrete.task_type is not None else ()
    if isinstance(concrete, PromptLearningConfig):
        fill_sizes(model, concrete)
    if heads and isinstance(concrete, (ModuleConfig, PromptLearningConfig)):
        concrete.modules_to_save = list(dict.fromkeys([*(concrete.modules_to_save or ()), *heads]))
    return concrete


def file_fields(model: nn.Module, config: PeftConfig) -> dict[str, Any]:
    """The configuration as it is saved: in inference mode, and naming the base's class when no task does."""
    fields = config.saved_as().to_dict() | {"inference_mode": True}
    if config.task_type is None:
        base = type(model)
        fields["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return fields
