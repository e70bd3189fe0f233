"""QLoRA on an ordinary machine: 4-bit base weights, fused kernels, PEFT-compatible adapters.

Names load on first use, so that `import ferrolora` costs little more than importing torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ferrolora import _register
from ferrolora import ops as ops  # registers torch.ops.ferrolora.*, which compiled graphs refer to by name

if TYPE_CHECKING:
    from ferrolora import cuda as cuda
    from ferrolora import nn as nn
    from ferrolora.adapters.adalora import AdaLoraConfig as AdaLoraConfig
    from ferrolora.adapters.adamix import AdaMixConfig as AdaMixConfig
    from ferrolora.adapters.config import PeftConfig as PeftConfig
    from ferrolora.adapters.config import PeftType as PeftType
    from ferrolora.adapters.config import TaskType as TaskType
    from ferrolora.adapters.ia3 import IA3Config as IA3Config
    from ferrolora.adapters.loha import LoHaConfig as LoHaConfig
    from ferrolora.adapters.lora import LoraConfig as LoraConfig
    from ferrolora.adapters.lora_plus import lora_plus_groups as lora_plus_groups
    from ferrolora.adapters.multitask_prompt import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from ferrolora.adapters.p_tuning import PromptEncoderConfig as PromptEncoderConfig
    from ferrolora.adapters.prefix import PrefixTuningConfig as PrefixTuningConfig
    from ferrolora.adapters.prompt import PromptTuningConfig as PromptTuningConfig
    from ferrolora.adapters.reversible import ReversibleConfig as ReversibleConfig
    from ferrolora.adapters.siblings import share_inputs as share_inputs
    from ferrolora.errors import CudaError as CudaError
    from ferrolora.errors import FerroloraError as FerroloraError
    from ferrolora.errors import FormatError as FormatError
    from ferrolora.errors import QuantizationError as QuantizationError
    from ferrolora.errors import ShapeError as ShapeError
    from ferrolora.errors import TargetError as TargetError
    from ferrolora.errors import UnsupportedError as UnsupportedError
    from ferrolora.integrations.transformers import FerroloraConfig as FerroloraConfig
    from ferrolora.model.auto import AutoPeftModel as AutoPeftModel
    from ferrolora.model.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from ferrolora.model.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from ferrolora.model.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from ferrolora.model.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from ferrolora.model.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from ferrolora.model.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from ferrolora.model.eva import initialize_lora_eva_weights as initialize_lora_eva_weights
    from ferrolora.model.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from ferrolora.model.peft_model import PeftModel as PeftModel
    from ferrolora.model.quantize import quantize_model as quantize_model
    from ferrolora.model.state_dict import get_peft_model_state_dict as get_peft_model_state_dict
    from ferrolora.model.state_dict import set_peft_model_state_dict as set_peft_model_state_dict
    from ferrolora.model.tasks import PeftModelForCausalLM as PeftModelForCausalLM
    from ferrolora.model.tasks import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from ferrolora.model.tasks import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from ferrolora.model.tasks import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from ferrolora.model.tasks import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from ferrolora.model.tasks import PeftModelForTokenClassification as PeftModelForTokenClassification
    from ferrolora.model.tasks import get_peft_model as get_peft_model
    from ferrolora.ops.dequantize import dequantize as dequantize
    from ferrolora.ops.linear import LowRank as LowRank
    from ferrolora.ops.linear import linear as linear
    from ferrolora.ops.linear_group import Sibling as Sibling
    from ferrolora.ops.linear_group import linear_group as linear_group
    from ferrolora.ops.quantize import quantize as quantize
    from ferrolora.spec import QuantSpec as QuantSpec
    from ferrolora.tensor import QuantTensor as QuantTensor

_HOME = {  # public name -> the module that defines it
    "quantize": "ferrolora.ops.quantize",
    "dequantize": "ferrolora.ops.dequantize",
    "linear": "ferrolora.ops.linear",
    "LowRank": "ferrolora.ops.linear",
    "linear_group": "ferrolora.ops.linear_group",
    "share_inputs": "ferrolora.adapters.siblings",
    "Sibling": "ferrolora.ops.linear_group",
    "QuantSpec": "ferrolora.spec",
    "QuantTensor": "ferrolora.tensor",
    "FerroloraError": "ferrolora.errors",
    "ShapeError": "ferrolora.errors",
    "QuantizationError": "ferrolora.errors",
    "UnsupportedError": "ferrolora.errors",
    "FormatError": "ferrolora.errors",
    "CudaError": "ferrolora.errors",
    "TargetError": "ferrolora.errors",
    "LoraConfig": "ferrolora.adapters.lora",
    "AdaLoraConfig": "ferrolora.adapters.adalora",
    "IA3Config": "ferrolora.adapters.ia3",
    "LoHaConfig": "ferrolora.adapters.loha",
    "AdaMixConfig": "ferrolora.adapters.adamix",
    "ReversibleConfig": "ferrolora.adapters.reversible",
    "PromptTuningConfig": "ferrolora.adapters.prompt",
    "PromptEncoderConfig": "ferrolora.adapters.p_tuning",
    "PrefixTuningConfig": "ferrolora.adapters.prefix",
    "MultitaskPromptTuningConfig": "ferrolora.adapters.multitask_prompt",
    "lora_plus_groups": "ferrolora.adapters.lora_plus",
    "initialize_lora_eva_weights": "ferrolora.model.eva",
    "TaskType": "ferrolora.adapters.config",
    "PeftType": "ferrolora.adapters.config",
    "PeftConfig": "ferrolora.adapters.config",
    "get_peft_model": "ferrolora.model.tasks",
    "PeftModel": "ferrolora.model.peft_model",
    "PeftModelForCausalLM": "ferrolora.model.tasks",
    "PeftModelForFeatureExtraction": "ferrolora.model.tasks",
    "PeftModelForQuestionAnswering": "ferrolora.model.tasks",
    "PeftModelForSeq2SeqLM": "ferrolora.model.tasks",
    "PeftModelForSequenceClassification": "ferrolora.model.tasks",
    "PeftModelForTokenClassification": "ferrolora.model.tasks",
    "AutoPeftModel": "ferrolora.model.auto",
    "AutoPeftModelForCausalLM": "ferrolora.model.auto",
    "AutoPeftModelForFeatureExtraction": "ferrolora.model.auto",
    "AutoPeftModelForQuestionAnswering": "ferrolora.model.auto",
    "AutoPeftModelForSeq2SeqLM": "ferrolora.model.auto",
    "AutoPeftModelForSequenceClassification": "ferrolora.model.auto",
    "AutoPeftModelForTokenClassification": "ferrolora.model.auto",
    "prepare_model_for_kbit_training": "ferrolora.model.kbit",
    "quantize_model": "ferrolora.model.quantize",
    "get_peft_model_state_dict": "ferrolora.model.state_dict",
    "set_peft_model_state_dict": "ferrolora.model.state_dict",
    "FerroloraConfig": "ferrolora.integrations.transformers",
}
_SUBMODULES = ("cuda", "nn")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"ferrolora.{name}")
    if name == "__version__":
        from ferrolora import _native

        return _native.version()
    if name not in _HOME:
        raise AttributeError(f"module 'ferrolora' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBMODULES, "__version__"})


# Last, so that the package is whole if this imports the integration at once.
_register.install()
