"""`AutoPeftModelFor…`: an adapter together with the base model that its configuration names."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar

from ferrolora.adapters.config import PeftConfig, TaskType
from ferrolora.errors import FormatError
from ferrolora.model.peft_model import PeftModel

_HUB_OPTIONS = ("subfolder", "token", "cache_dir")


class AutoPeftModel:
    """Loads the base of a saved adapter with transformers, then the adapter."""

    auto_class: ClassVar[str | None] = None  # the transformers class that loads the base

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The base that `base_model_name_or_path` names, with the adapter in it.

        Args:
            pretrained_model_name_or_path: directory or repository of the adapter.
            adapter_name: its name in memory. Default "default".
            is_trainable: train it further. Default False.
            revision: of the adapter's repository; the base's is in the configuration.
            **kwargs: `subfolder` of the adapter; all others go to the base's `from_pretrained`
                (`quantization_config`, `dtype`, `device_map`, `token`, …).

        Raises:
            FormatError: the configuration names no base, or `AutoPeftModel` cannot tell its class.
        """
        hub = {key: kwargs[key] for key in _HUB_OPTIONS if key in kwargs} | {"revision": revision}
        kwargs.pop("subfolder", None)
        config = PeftConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        if config.base_model_name_or_path is None:
            raise FormatError(
                f"{pretrained_model_name_or_path}: adapter_config.json names no base_model_name_or_path; "
                "load the base yourself and call PeftModel.from_pretrained(base, …)"
            )
        base_class = cls._base_class(config, pretrained_model_name_or_path, kwargs)
        base = base_class.from_pretrained(config.base_model_name_or_path, revision=config.revision, **kwargs)
        return PeftModel.from_pretrained(base, pretrained_model_name_or_path, adapter_name, is_trainable, **hub)

    @classmethod
    def _base_class(cls, config: PeftConfig, where: str | PathLike[str], options: Mapping[str, Any]) -> Any:
        import transformers

        task = TaskType(config.task_type) if config.task_type is not None else None
        name = cls.auto_class or (_AUTO_CLASS_OF_TASK[task] if task is not None else None)
        if name is None and config.auto_mapping is not None:
            name = config.auto_mapping.get("base_model_class")
        if name is None or not hasattr(transformers, name):
            raise FormatError(f"{where}: neither task_type nor auto_mapping names a class of transformers ({name!r})")
        if name in _ALSO:
            name = _that_knows(config, (name, _ALSO[name]), options)
        return getattr(transformers, name)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """`AutoPeftModel` over `transformers.AutoModelForCausalLM`."""

    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """`AutoPeftModel` over `transformers.AutoModelForSeq2SeqLM`."""

    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """`AutoPeftModel` over `transformers.AutoModelForSequenceClassification`."""

    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """`AutoPeftModel` over `transformers.AutoModelForTokenClassification`."""

    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """`AutoPeftModel` over `transformers.AutoModelForQuestionAnswering`."""

    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """`AutoPeftModel` over `transformers.AutoModel`."""

    auto_class = "AutoModel"


_AUTO_CLASS_OF_TASK = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}

# transformers registers models that read sounds or pictures and write text under classes of their own.
_ALSO = {"AutoModelForSeq2SeqLM": "AutoModelForSpeechSeq2Seq", "AutoModelForCausalLM": "AutoModelForImageTextToText"}
_MODELS_OF = {
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
}


def _that_knows(config: PeftConfig, names: tuple[str, str], options: Mapping[str, Any]) -> str:
    """The first of two automatic classes that has a model for the base's configuration; else the first."""
    import transformers

    base = options.get("config")
    if base is None:
        own = {
            key: options[key]
            for key in ("token", "cache_dir", "local_files_only", "trust_remote_code")
            if key in options
        }
        name = str(config.base_model_name_or_path)
        base = transformers.AutoConfig.from_pretrained(name, revision=config.revision, **own)
    known = [name for name in names if type(base) in getattr(transformers, _MODELS_OF[name])]
    return known[0] if known else names[0]
