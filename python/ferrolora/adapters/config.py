"""What every adapter configuration has: its method, its task, the model it belongs to, and its JSON file."""

import copy
import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from os import PathLike
from typing import Any

from ferrolora.errors import FormatError, UnsupportedError

# The release of PEFT whose file format is read and written; stored in every file, as PEFT itself does.
PEFT_FORMAT_VERSION = "0.21.2"


class PeftType(str, Enum):
    """The adapter methods that can be trained, saved and loaded."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    LOHA = "LOHA"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    ADAMIX = "ADAMIX"  # ours; its files are LoRA's
    REVERSIBLE = "REVERSIBLE"  # ours


class TaskType(str, Enum):
    """What the base model is for; it decides which newly initialised head is trained and saved in full."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass
class PeftConfig:
    """The part of an adapter's configuration that does not depend on the method.

    Args:
        task_type: a `TaskType` or its name; default None (any model, no head trained by itself).
        peft_type: set by each method's own class.
        auto_mapping: class and library of the base, written when `task_type` is None.
        peft_version: release of PEFT whose file format this is; default the one written here.
        base_model_name_or_path: where the base model came from; filled in by `get_peft_model`.
        revision: revision of the base model on the Hub.
        inference_mode: True keeps the adapter frozen; True in every saved file.

    Raises:
        UnsupportedError: an unknown `task_type`.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.task_type is not None:
            valid = [task.value for task in TaskType]
            if self.task_type not in valid:
                raise UnsupportedError(f"task_type {self.task_type!r} is unknown; choose one of {', '.join(valid)}")
            self.task_type = TaskType(self.task_type)
        if self.peft_version is None:
            self.peft_version = PEFT_FORMAT_VERSION

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method trains virtual tokens instead of changing modules."""
        return False

    def saved_as(self) -> "PeftConfig":
        """The configuration that a file gets: this one, unless the method is saved as another."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON (sets as sorted lists, enumerations as their values)."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def save_pretrained(self, save_directory: str | PathLike[str]) -> None:
        """Writes `adapter_config.json` (2-space indent, sorted keys) into `save_directory`, in one rename."""
        from ferrolora.io.adapter import write_config

        write_config(save_directory, self.to_dict())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], subfolder: str | None = None, **hub: Any
    ) -> "PeftConfig":
        """Reads `adapter_config.json` and returns the configuration class that its `peft_type` names.

        Args:
            pretrained_model_name_or_path: a directory, or a repository on the Hub.
            subfolder: folder inside it (an adapter with another name than "default" lies in one).
            **hub: `revision`, `token`, `cache_dir` for a repository.

        Raises:
            FormatError: no such file, no `peft_type` in it, or a method unknown here.
            UnsupportedError: a field asks for something that is not supported; the message names it.
        """
        from ferrolora.io.adapter import read_config
        from ferrolora.io.hub import local_directory

        directory = local_directory(pretrained_model_name_or_path, subfolder=subfolder, **hub)
        return cls.from_dict(read_config(directory), where=str(directory))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "dict") -> "PeftConfig":
        """Builds the configuration class that `values["peft_type"]` names; unknown keys go, with one warning."""
        from ferrolora.adapters.registry import method_of  # the registry's rows import this module

        if "peft_type" not in values:
            raise FormatError(f"{where}: the adapter configuration has no 'peft_type'")
        config_class = method_of(values["peft_type"]).config_class
        known = {field.name for field in dataclasses.fields(config_class)}
        unknown = sorted(set(values) - known)
        if unknown:
            warnings.warn(
                f"{where}: fields unknown to {config_class.__name__} are dropped: {', '.join(unknown)}", stacklevel=2
            )
        config = config_class(**{key: copy.deepcopy(value) for key, value in values.items() if key in known})
        if not isinstance(config, cls):
            raise FormatError(f"{where}: a {config.peft_type} configuration is not a {cls.__name__}")
        return config


@dataclass
class ModuleConfig(PeftConfig):
    """The part of a configuration that says which modules of the model are adapted.

    Args:
        target_modules: a regular expression that must match the whole name; or a list of whole names and `.suffix`es;
            or "all-linear". Default None: the method's own choice.
        exclude_modules: the same forms; what they match is not adapted. Default None.
        modules_to_save: names of modules that are trained and saved in full. Default None.

    Raises:
        UnsupportedError: `modules_to_save` is a single string.
    """

    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "feedforward_modules"):
            value = getattr(self, name, None)
            if isinstance(value, (set, frozenset, tuple)):
                setattr(self, name, sorted(value) if not isinstance(value, tuple) else list(value))
            if isinstance(value, str) and name == "modules_to_save":
                raise UnsupportedError(f"{type(self).__name__}(modules_to_save={value!r}) must be a list of names")


@dataclass
class LayerConfig(ModuleConfig):
    """A `ModuleConfig` that can be narrowed to some layers, with other ranks for some modules.

    Args:
        layers_to_transform: index or indices of the layers that get adapters. Default None: all.
        layers_pattern: name of the list of layers, when there are several. Default None.

    Raises:
        UnsupportedError: layers chosen beside a regular expression, or a pattern without layers.
    """

    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = type(self).__name__
        pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if pattern and (self.layers_to_transform is not None or self.layers_pattern):
            raise UnsupportedError(f"{kind}: layers_to_transform needs a list of target_modules, not a pattern")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UnsupportedError(f"{kind}: layers_pattern needs layers_to_transform")


def check_rank(kind: str, name: str, rank: Any) -> None:
    """Raises UnsupportedError unless `rank`, of field or pattern `name`, is a positive integer."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UnsupportedError(f"{kind}: the rank of {name!r} must be a positive integer, not {rank!r}")


def check_alpha(kind: str, name: str, alpha: Any) -> None:
    """Raises UnsupportedError unless `alpha`, of field or pattern `name`, is a number."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise UnsupportedError(f"{kind}: the alpha of {name!r} must be a number, not {alpha!r}")


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    r"""The value of the first pattern that matches `path` as `(.*\.)?pattern$`, else `default`."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return copy.deepcopy(value)
