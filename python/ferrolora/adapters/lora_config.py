"""LoRA's configuration: the fields, defaults and file of PEFT 0.21."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ferrolora.adapters.config import PeftConfig, PeftType
from ferrolora.adapters.init import initializer
from ferrolora.errors import UnsupportedError

BIAS_CHOICES = ("none", "all", "lora_only")

# Fields of the file format whose mathematics is not implemented: any value but the default is refused by name.
_ONLY_DEFAULT: dict[str, Any] = {
    "megatron_config": None,
    "trainable_token_indices": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "use_dora": False,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "layer_replication": None,
    "target_parameters": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}


@dataclass
class LoraConfig(PeftConfig):
    r"""y = W·x + s·B·A·drop(x), with s = lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.

    Args:
        r: rank of A [r, in] and B [out, r]. Default 8.
        target_modules: which modules get an adapter. A string is a regular expression that must match the whole
            name; a list matches whole names and `.suffix`es; "all-linear" and None (default) mean every linear but
            the output head and task heads.
        exclude_modules: the same forms; what they match gets none. Default None.
        lora_alpha: numerator of s. Default 8.
        lora_dropout: probability in [0, 1) of dropping an input of A while training. Default 0.
        fan_in_fan_out: layout of the weight in the file's terms; kept for PEFT, since the module itself tells.
        bias: which base biases are trained and saved: "none" (default), "all", "lora_only".
        use_rslora: rank-stabilised scaling, arXiv 2312.03732. Default False.
        modules_to_save: names of modules that are trained and saved in full. Default None; a classification task
            adds its heads.
        init_lora_weights: True (A Kaiming-uniform, B zero; default), "gaussian", or False (A and B both random).
        layers_to_transform: index or indices of the layers that get adapters. Default None: all.
        layers_pattern: name of the list of layers, when there are several. Default None.
        rank_pattern: {name pattern: r} for modules with another rank; a pattern matches as `(.*\.)?pattern$`.
        alpha_pattern: the same for lora_alpha.
        lora_bias: give B a trained bias. Default False.

    Every other field exists because PEFT's file has it; a value other than its default is refused.

    Raises:
        UnsupportedError: a value outside these; the message names the field.

    Source: LoRA, arXiv 2106.09685.
    """

    r: int = 8
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Any = None
    loftq_config: Any = field(default_factory=dict)
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: Any = None
    lora_bias: bool = False
    target_parameters: Any = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        for name, default in _ONLY_DEFAULT.items():
            if getattr(self, name) != default:
                raise UnsupportedError(
                    f"LoraConfig({name}={getattr(self, name)!r}) is not supported; the only value is {default!r}"
                )
        self._check_numbers()
        self._check_names()
        initializer(self.init_lora_weights)

    def _check_numbers(self) -> None:
        ranks: dict[str, Any] = {"r": self.r, **self.rank_pattern}
        alphas: dict[str, Any] = {"lora_alpha": self.lora_alpha, **self.alpha_pattern}
        for name, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise UnsupportedError(f"LoraConfig: the rank of {name!r} must be a positive integer, not {rank!r}")
        for name, alpha in alphas.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
                raise UnsupportedError(f"LoraConfig: the alpha of {name!r} must be a number, not {alpha!r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UnsupportedError(f"LoraConfig(lora_dropout={self.lora_dropout!r}) is outside [0, 1)")
        if self.bias not in BIAS_CHOICES:
            raise UnsupportedError(f"LoraConfig(bias={self.bias!r}) is unknown; choose one of {BIAS_CHOICES}")

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset, tuple)):
                setattr(self, name, sorted(value) if not isinstance(value, tuple) else list(value))
            if isinstance(value, str) and name == "modules_to_save":
                raise UnsupportedError(f"LoraConfig(modules_to_save={value!r}) must be a list of names")
        pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if pattern and (self.layers_to_transform is not None or self.layers_pattern):
            raise UnsupportedError("LoraConfig: layers_to_transform needs a list of target_modules, not a pattern")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UnsupportedError("LoraConfig: layers_pattern needs layers_to_transform")
