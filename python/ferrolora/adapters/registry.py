"""THE table of adapter methods: peft_type -> configuration class and the function that wraps a module."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ferrolora.adapters import adalora, adamix, ia3, loha, lora, multitask_prompt, p_tuning, prefix, prompt, reversible
from ferrolora.adapters.base import AdapterLayer
from ferrolora.adapters.config import PeftConfig, PeftType
from ferrolora.adapters.prompt_base import PromptEncoder, PromptLearningConfig, PromptStart
from ferrolora.errors import UnsupportedError


class AdapterMethod(NamedTuple):
    """One row: a method's configuration, and what it does with a model.

    Attributes:
        config_class: of the method.
        wrap: puts the adapter around a module (its path is for messages); None for virtual tokens.
        penalty: what the method adds to a training loss.
        passes: runs a training pass in the method's own way: (run, layers, name, config, inputs) -> outputs.
        encoder: makes virtual tokens; None for a method that adapts modules.
    """

    config_class: type[PeftConfig]
    wrap: Callable[[nn.Module, str, PeftConfig], AdapterLayer] | None = None
    penalty: Callable[[Iterable[AdapterLayer], str, PeftConfig], Tensor | None] | None = None
    passes: Callable[[Callable[[], Any], Iterable[AdapterLayer], str, PeftConfig, Mapping[str, Any]], Any] | None = None
    encoder: Callable[[PromptLearningConfig, PromptStart], PromptEncoder] | None = None


METHODS: dict[PeftType, AdapterMethod] = {
    PeftType.LORA: AdapterMethod(lora.LoraConfig, lora.wrap),
    PeftType.ADALORA: AdapterMethod(adalora.AdaLoraConfig, adalora.wrap, adalora.orthogonal_penalty),
    PeftType.IA3: AdapterMethod(ia3.IA3Config, ia3.wrap),
    PeftType.LOHA: AdapterMethod(loha.LoHaConfig, loha.wrap),
    PeftType.PROMPT_TUNING: AdapterMethod(prompt.PromptTuningConfig, encoder=prompt.PromptEmbedding),
    PeftType.P_TUNING: AdapterMethod(p_tuning.PromptEncoderConfig, encoder=p_tuning.build),
    PeftType.PREFIX_TUNING: AdapterMethod(prefix.PrefixTuningConfig, encoder=prefix.build),
    PeftType.MULTITASK_PROMPT_TUNING: AdapterMethod(
        multitask_prompt.MultitaskPromptTuningConfig, encoder=multitask_prompt.MultitaskPromptEmbedding
    ),
    PeftType.ADAMIX: AdapterMethod(adamix.AdaMixConfig, adamix.wrap, passes=adamix.two_passes),
    PeftType.REVERSIBLE: AdapterMethod(
        reversible.ReversibleConfig
    ),  # a stack of layers, not a module: model/reversible.py
}


def method_of(peft_type: PeftType | str | None) -> AdapterMethod:
    """The row of a method. Raises UnsupportedError with the valid names for any other."""
    valid = {method.value: method for method in METHODS}
    if peft_type not in valid:
        raise UnsupportedError(f"peft_type {peft_type!r} is not supported; choose one of {', '.join(valid)}")
    return METHODS[PeftType(peft_type)]
