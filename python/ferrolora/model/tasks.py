"""The class of a `PeftModel` for each task, and `get_peft_model`, which chooses it."""

from collections.abc import Mapping
from os import PathLike

from torch import Tensor, nn

from ferrolora.adapters.config import PeftConfig, TaskType
from ferrolora.model.peft_model import PeftModel


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with adapters."""


class PeftModelForSequenceClassification(PeftModel):
    """A sequence classifier with adapters; its head (`classifier`, `score`) is trained and saved in full."""


class PeftModelForTokenClassification(PeftModel):
    """A token classifier with adapters; its head (`classifier`, `score`) is trained and saved in full."""


class PeftModelForQuestionAnswering(PeftModel):
    """An extractive question answerer with adapters; its head (`qa_outputs`) is trained and saved in full."""


class PeftModelForFeatureExtraction(PeftModel):
    """An encoder without a head, with adapters."""


TASK_CLASSES: dict[TaskType, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def task_class(config: PeftConfig, default: type[PeftModel]) -> type[PeftModel]:
    """The class for the task that `config` names, or `default`."""
    return TASK_CLASSES[TaskType(config.task_type)] if config.task_type is not None else default


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    float_weights: str | PathLike[str] | Mapping[str, Tensor] | None = None,
) -> PeftModel:
    """Wraps the targeted modules of `model` in place, freezes the rest, and returns the model to train.

    Args:
        model: any torch module; over a packed base run `prepare_model_for_kbit_training` first.
        peft_config: which adapter; copied, not changed.
        adapter_name: default "default".
        autocast_adapter_dtype: adapter weights are at least float32 (default True), else of the base's type.
        float_weights: the float weights of a packed base, for initializers that start from them; see `PeftModel`.

    Returns:
        A `PeftModel`, of the class that `peft_config.task_type` names.

    Raises:
        TargetError: the configuration matches no module, or one that cannot be adapted.
    """
    return task_class(peft_config, PeftModel)(model, peft_config, adapter_name, autocast_adapter_dtype, float_weights)
