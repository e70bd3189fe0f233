"""LoRA's configuration: the fields, defaults and file of PEFT 0.21."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ferrolora.adapters.config import LayerConfig, PeftType, check_alpha, check_rank
from ferrolora.adapters.init import initializer
from ferrolora.errors import UnsupportedError

BIAS_CHOICES = ("none", "all", "lora_only")

# Fields of the file format whose mathematics is not implemented: any value but the default is refused by name.
_ONLY_DEFAULT: dict[str, Any] = {
    "megatron_config": None,
    "corda_config": None,
    "lora_ga_config": None,
    "velora_config": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "layer_replication": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "ensure_weight_tying": False,
}


@dataclass
class LoraConfig(LayerConfig):
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
        init_lora_weights: True (A Kaiming-uniform, B zero; default), "gaussian", False (A and B both random), "pissa",
            "pissa_niter_<n>", "olora", "loftq" (see `loftq_config`), or "eva" (see `initialize_lora_eva_weights`).
        layers_to_transform: index or indices of the layers that get adapters. Default None: all.
        layers_pattern: name of the list of layers, when there are several. Default None.
        trainable_token_indices: rows of the input embedding that are trained beside the adapter: a list of token ids,
            or {name of an embedding: ids}. Default None.
        loftq_config: {"loftq_bits": 4, "loftq_iter": 1} for "loftq"; bits count over a float base only.
        eva_config: {"rho": 2.0, "tau": 0.99, "adjust_scaling_factors": true} for "eva".
        use_dora: DoRA, arXiv 2402.09353: y = (m/‖W + sBA‖)·(W + sBA)·x with a trained magnitude m [out]. Default False.
        rank_pattern: {name pattern: r} for modules with another rank; a pattern matches as `(.*\.)?pattern$`.
        alpha_pattern: the same for lora_alpha.
        lora_bias: give B a trained bias. Default False.
        target_parameters: parameters that get an adapter, by name or `.suffix`: those of fused experts, as in
            `["experts.gate_up_proj", "experts.down_proj"]`, each expert with its own A and B. Default None. With it
            `target_modules=None` means no modules. No dropout, lora_bias, DoRA, nor a start from the weight.

    Every other field exists because PEFT's file has it; a value other than its default is refused.

    Raises:
        UnsupportedError: a value outside these; the message names the field.

    Source: LoRA, arXiv 2106.09685.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: Sequence[int] | dict[str, list[int]] | None = None
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
    target_parameters: Sequence[str] | None = None
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
        self._check_initializer()
        if self.target_parameters is not None:
            self._check_parameters()

    def _check_numbers(self) -> None:
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            check_rank("LoraConfig", name, rank)
        for name, alpha in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            check_alpha("LoraConfig", name, alpha)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UnsupportedError(f"LoraConfig(lora_dropout={self.lora_dropout!r}) is outside [0, 1)")
        if self.bias not in BIAS_CHOICES:
            raise UnsupportedError(f"LoraConfig(bias={self.bias!r}) is unknown; choose one of {BIAS_CHOICES}")
        if self.use_dora and self.lora_bias:
            raise UnsupportedError("LoraConfig(use_dora=True, lora_bias=True): DoRA has no place for a bias of B")

    def _check_parameters(self) -> None:
        if isinstance(self.target_parameters, str):
            raise UnsupportedError(
                f"LoraConfig(target_parameters={self.target_parameters!r}) must be a list of names or .suffixes"
            )
        self.target_parameters = list(self.target_parameters or ())
        if self.target_modules is None and self.target_parameters:
            self.target_modules = []
        if self.target_parameters and type(self) is not LoraConfig:
            raise UnsupportedError(f"{type(self).__name__} adapts modules; only LoraConfig has target_parameters")
        for name, value in {
            "lora_dropout": 0.0,
            "lora_bias": False,
            "use_dora": False,
            "fan_in_fan_out": False,
        }.items():
            if self.target_parameters and getattr(self, name) != value:
                raise UnsupportedError(
                    f"LoraConfig({name}={getattr(self, name)!r}) does not go with target_parameters, as in PEFT; "
                    f"the only value is {value!r}"
                )
        if self.target_parameters and self.init_lora_weights not in (True, False, "gaussian"):
            raise UnsupportedError(
                f"LoraConfig(init_lora_weights={self.init_lora_weights!r}) does not go with target_parameters; "
                "choose True, False or 'gaussian'"
            )

    def _check_initializer(self) -> None:
        initializer(self.init_lora_weights)
        for name, owner in (("loftq_config", "loftq"), ("eva_config", "eva")):
            if getattr(self, name) and self.init_lora_weights != owner:
                raise UnsupportedError(f"LoraConfig({name}=…) needs init_lora_weights={owner!r}")
        unknown = sorted(set(self.loftq_config or {}) - {"loftq_bits", "loftq_iter"})
        if unknown:
            raise UnsupportedError(f"LoraConfig: loftq_config has unknown keys {unknown}")
