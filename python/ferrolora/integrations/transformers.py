"""Transformers: `FerroloraConfig` for `from_pretrained`, and the quantizer behind it.

A linear layer becomes a `QuantLinear` when its weight arrives from the checkpoint, one tensor at a time. So the peak
while loading is the quantized model and one tensor, a layer that the checkpoint does not know (a new head) is never
quantized, and for a checkpoint that holds quantized weights the file alone decides what is quantized.

The experts of a mixture become a `QuantExperts`. There one tensor is one projection of all experts of a layer, which
transformers collects from the checkpoint's tensors of single experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ferrolora.errors import FormatError, UnsupportedError
from ferrolora.io.bitsandbytes import LABEL, spec_of_label
from ferrolora.model.conv1d import conv1d_paths, restore_conv1d
from ferrolora.nn import QuantLinear
from ferrolora.nn.expert_stack import HEADER, PARTS
from ferrolora.nn.experts import PROJECTIONS, QuantExperts, check_layout, is_fused_experts
from ferrolora.spec import QuantSpec

METHOD = "ferrolora"

# The layer that sends tokens to experts is small and decides discretely: an error in it is not an error in proportion.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "classifier"})

FLOAT_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Keys of one quantized linear after its module's name. Source: the checkpoint format of bitsandbytes 0.50.
# "weight" comes last: up to transformers 5.20 the first that is found in a key is taken for it.
SERIALIZED_NAMES = [
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
    "SCB",
    "weight_format",
    "weight",
]


class FerroloraConfig(QuantizationConfigMixin):
    """How `from_pretrained(path, quantization_config=…)` quantizes a model's linear layers and fused experts.

    The output head, task heads, routers, tied weights, and layers that the checkpoint does not hold stay as they are.

    Args:
        quant_type: "nf4" (default), "fp4" or "int8".
        block_size: weights that share one scale, for the 4-bit types: 32, 64 (default), … 4096.
        double_quant: quantize the scales of the 4-bit types to 8 bits; default True (4.127 bits a weight, not 4.5).
        skip_modules: further modules to leave as they are: full names, ends of names, or regular expressions.
        compute_dtype: float type that `dequantize()` and merging give by default: a torch dtype or its name; None
            (default) is the model's own.

    Raises:
        UnsupportedError: an unknown quant_type, block_size or compute_dtype; lists the valid ones.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        skip_modules: Sequence[str] | None = None,
        compute_dtype: torch.dtype | str | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise FormatError(f"quant_method is {quant_method!r}; FerroloraConfig reads {METHOD!r}")
        spec = QuantSpec(quant_type, block_size, double_quant)
        self.quant_method: Any = METHOD
        self.quant_type = spec.quant_type
        self.block_size = spec.block_size
        self.double_quant = spec.double_quant
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.compute_dtype = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
        if self.compute_dtype is not None and self.compute_dtype not in FLOAT_TYPES:
            raise UnsupportedError(f"compute_dtype {self.compute_dtype!r} is not one of {', '.join(FLOAT_TYPES)}")

    @property
    def spec(self) -> QuantSpec:
        """The codec of the quantized weights."""
        return QuantSpec(self.quant_type, self.block_size, self.double_quant)

    @classmethod
    def from_spec(cls, spec: QuantSpec, skip_modules: Sequence[str] | None = None) -> FerroloraConfig:
        """The config that quantizes by `spec`."""
        return cls(spec.quant_type, spec.block_size, spec.double_quant, skip_modules)

    @classmethod
    def from_bitsandbytes(cls, label: Mapping[str, Any]) -> FerroloraConfig:
        """The config that reads a checkpoint labelled `quant_method: bitsandbytes`, whose bytes are ours.

        Args:
            label: the `quantization_config` of its config.json.

        Raises:
            FormatError: another method, or neither 4 nor 8 bits.
        """
        return cls.from_spec(spec_of_label(label), label.get("llm_int8_skip_modules"))


class FerroloraQuantizer(HfQuantizer):
    """Loads and saves quantized models; made by transformers when a config says `quant_method: ferrolora`."""

    quantization_config: FerroloraConfig
    requires_calibration = False

    def __init__(self, quantization_config: FerroloraConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._targets: frozenset[str] = frozenset()
        self._experts: frozenset[str] = frozenset()
        self._arrived: set[str] = set()

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        """Refuse devices that have no kernel."""
        places = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        elsewhere = sorted(name for name in map(str, places) if not _has_kernels(name))
        if elsewhere:
            raise UnsupportedError(f"device_map puts modules on {elsewhere}; quantized layers run on 'cpu' and 'cuda'")

    def update_device_map(self, device_map: Any) -> Any:
        """`"auto"` may choose any device: the first GPU if there is one, else the CPU, so that nothing is offloaded."""
        if device_map != "auto":
            return device_map
        return {"": "cuda:0" if torch.cuda.is_available() else "cpu"}

    @property
    def quantized_element_size(self) -> float:
        """Bytes of one quantized weight, its share of the scales included."""
        spec = self.quantization_config.spec
        if not spec.is_4bit:
            return 1.0
        scale = 1 + 4 / 256 if spec.double_quant else 4
        return 0.5 + scale / spec.block_size

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        skipped = self.quantization_config.skip_modules or ()
        self._targets = frozenset(quantizable_linears(model, skipped))
        self._experts = frozenset(quantizable_experts(model, skipped))
        if not self._targets and not self._experts:
            raise UnsupportedError(
                f"{type(model).__name__} has no linear layer to quantize "
                f"(skip_modules={self.quantization_config.skip_modules})"
            )

    def param_needs_quantization(self, model: Any, param_name: str, **context: Any) -> bool:
        """Whether this parameter is the float weight of a layer, or of experts, to quantize."""
        layer, _, parameter = param_name.rpartition(".")
        return (parameter == "weight" and layer in self._targets) or layer in self._experts

    def get_quantize_ops(self) -> Any:
        """The step that turns a float weight, as it arrives, into a `QuantLinear` or a part of a `QuantExperts`."""
        from ferrolora.integrations.weight_conversion import QuantizeWeight

        return QuantizeWeight(self.quantization_config, self._arrived)

    def get_weight_conversions(self) -> list[Any]:
        """The steps that turn the tensors of one quantized weight into a `QuantLinear` or a part of `QuantExperts`."""
        from transformers.core_model_loading import WeightConverter

        from ferrolora.integrations.weight_conversion import ReadExperts, ReadQuantized

        if not self.pre_quantized:
            return []
        steps: list[Any] = [ReadQuantized(self.quantization_config)]
        linears = WeightConverter(list(SERIALIZED_NAMES), ["weight"], operations=steps)
        experts: list[Any] = []
        for projection in PROJECTIONS:
            names = [f"{projection}_{part}" for part in (*PARTS, HEADER)]
            reading: list[Any] = [ReadExperts(self.quantization_config, self._arrived)]
            experts.append(WeightConverter(names, [projection], operations=reading))
        return [linears, *experts]

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        from ferrolora.integrations.weight_conversion import ReadExperts, ReadQuantized

        for name, module in model.named_modules():
            absent = [key for key in PROJECTIONS if f"{name}.{key}" not in self._arrived]
            if isinstance(module, QuantExperts) and absent:
                raise FormatError(
                    f"the checkpoint lacks {name}.{absent[0]}, but holds the other weights of its experts"
                )
        # Saving undoes the conversions that loading used; a quantized layer's state dict is already as the file is.
        used = getattr(model, "_weight_conversions", None)
        if used is not None:
            ours = [
                step
                for step in used
                if any(isinstance(op, (ReadQuantized, ReadExperts)) for op in getattr(step, "operations", ()))
            ]
            model._weight_conversions = [step for step in used if step not in ours]
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Leave the tensors of quantized weights as stored; ReadQuantized casts the plain ones it is given."""
        from ferrolora.integrations.weight_conversion import ReadExperts, ReadQuantized

        if any(isinstance(op, ReadExperts) for op in getattr(converter, "operations", ())):
            return None
        readers = [op for op in getattr(converter, "operations", ()) if isinstance(op, ReadQuantized)]
        for reader in readers:
            reader.float_dtype = dtype
        return None if readers else super().get_new_dtype(converter, param, dtype)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dtype = FLOAT_TYPES[dtype] if isinstance(dtype, str) else dtype  # config.dtype is a name after save_pretrained
        from_conv1d = conv1d_paths(model)
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                with torch.device("meta"):
                    plain = nn.Linear(module.in_features, module.out_features, bias=False)
                plain.weight = nn.Parameter(module.dequantize(dtype))
                plain.bias = module.bias
                model.set_submodule(name, plain)
            elif isinstance(module, QuantExperts):
                model.set_submodule(name, module.dense(dtype))
        restore_conv1d(model, from_conv1d)
        return model

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the quantized weights."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters train over the quantized base."""
        return True


def read_config(name: str | PathLike[str], **options: Any) -> Any:
    """`AutoConfig.from_pretrained`, with a bitsandbytes label rewritten: ferrolora then reads the quantized weights.

    `AutoModelForCausalLM.from_pretrained(name, config=read_config(name))` loads a 4- or 8-bit checkpoint of
    bitsandbytes without bitsandbytes; nothing is decoded or quantized again. Other configs come back as they are.

    Args:
        name: directory, or repository on the Hub.
        **options: for `AutoConfig.from_pretrained`.

    Raises:
        FormatError: the label names neither 4 nor 8 bits.
    """
    # Not at the top: this module is imported while transformers is being imported.
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, **options)
    label = getattr(config, "quantization_config", None)
    if isinstance(label, Mapping) and label.get("quant_method") == LABEL:
        config.quantization_config = FerroloraConfig.from_bitsandbytes(label).to_dict()
    return config


def quantizable_linears(model: Any, skip_modules: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers of a transformers model whose weights may be quantized.

    All of the backbone but routers, tied weights and layers the model keeps in float32; nothing outside of the
    backbone, since that is the output head or a task head.

    Args:
        model: a `PreTrainedModel`, on any device, meta included.
        skip_modules: further modules to leave out: full names, ends of names, or regular expressions.

    Returns: module names in the order of the model.
    """
    # Not at the top: this module is imported while transformers is being imported, and that one needs more of it.
    from transformers.pytorch_utils import Conv1D

    backbone = model.base_model
    inside = {id(module) for module in backbone.modules()}
    head = model.get_output_embeddings()
    tied = model.all_tied_weights_keys
    tied_modules = {key.rpartition(".")[0] for key in (*tied.keys(), *tied.values())}
    kept = [*skip_modules, *(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and id(module) in inside
        and module is not head
        and name not in tied_modules
        and name.rpartition(".")[2] not in ROUTERS
        and should_convert_module(name, kept)
    ]


def quantizable_experts(model: Any, skip_modules: Sequence[str] = ()) -> list[str]:
    """Names of the modules of a transformers model that hold fused experts, but those that are skipped.

    Args:
        model: a `PreTrainedModel`, on any device, meta included.
        skip_modules: modules to leave out: full names, ends of names, or regular expressions.

    Raises:
        UnsupportedError: experts with biases, without a gate, or stored transposed; the message says to skip them.
    """
    kept = [*skip_modules, *(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    found = [
        name for name, module in model.named_modules() if is_fused_experts(module) and should_convert_module(name, kept)
    ]
    for name in found:
        check_layout(model.get_submodule(name), name)
    return found


# Importing this module is what registers; ferrolora._register sees to it that the import happens in time.
register_quantization_config(METHOD)(FerroloraConfig)
register_quantizer(METHOD)(FerroloraQuantizer)


def _has_kernels(place: str) -> bool:
    """Whether quantized layers run on a device of a device_map: "cpu", "cuda", "cuda:1", 1, "auto" or None."""
    return place in ("cpu", "None", "auto") or place.partition(":")[0] == "cuda" or place.isdecimal()
