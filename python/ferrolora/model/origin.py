"""Where a base model came from, as the model itself says it."""

from collections.abc import Mapping

from torch import nn


def name_or_path(model: nn.Module) -> str | None:
    """The directory or repository that `model` was loaded from; None if it does not say.

    transformers' models have an attribute for it; others keep it in their configuration, a mapping.
    """
    name = getattr(model, "name_or_path", None)
    config = getattr(model, "config", None)
    if not name and isinstance(config, Mapping):
        name = config.get("_name_or_path")
    return str(name) if name else None
