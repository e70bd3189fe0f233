"""Where (IA)³ goes when nothing is said: keys, values and the second feed-forward layer, by the names models use."""

import re

from torch import nn

from ferrolora.adapters.ia3 import IA3Config
from ferrolora.errors import TargetError

# Projections to keys and values; a fused projection (queries too) counts, since nothing smaller can be rescaled.
_KEYS_AND_VALUES = (
    "k", "v", "k_proj", "v_proj", "key", "value", "key_proj", "value_proj", "k_lin", "v_lin",
    "query_key_value", "qkv_proj", "qkv", "c_attn", "in_proj", "Wqkv",
)  # fmt: skip
# The layer that leads from the widened features back: its input is what the paper rescales.
_FEEDFORWARD = (r"wo", r"down_proj", r"fc2", r"w2", r"dense_4h_to_h", r"fc_out", r"mlp\.c_proj", r"lin2")
_BERT_FEEDFORWARD = r".*(?<!attention)\.output\.dense"


def fill_targets(model: nn.Module, config: IA3Config) -> None:
    """Sets `target_modules` and `feedforward_modules` of `config` if it has no targets.

    Raises:
        TargetError: none of the known names is in the model.
    """
    if config.target_modules is not None:
        return
    feedforward = re.compile("|".join([rf"(.*\.)?{name}" for name in _FEEDFORWARD] + [_BERT_FEEDFORWARD]))
    projections = re.compile(rf"(.*\.)?({'|'.join(_KEYS_AND_VALUES)})")
    names = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    second = [path for path in names if feedforward.fullmatch(path)]
    keys = [path for path in names if projections.fullmatch(path)]
    if not keys:
        raise TargetError("IA3Config: no keys and values with known names in the model; give target_modules")
    config.target_modules = [*keys, *second]
    config.feedforward_modules = second


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"
