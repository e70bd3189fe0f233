"""Models and tokenizers by the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ferrolora.errors import FormatError
from ferrolora.spec import QUANT_TYPES, QuantSpec

QUANT_CHOICES = (*QUANT_TYPES, "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Usage error if `value` is not one of `choices`."""
    if value not in choices:
        raise typer.BadParameter(f"{option} {value!r} is not one of {', '.join(choices)}")


def require_directory(path: str | Path) -> None:
    """FormatError unless `path`, if it can only mean a directory, is one.

    A `Path` always means one; a text does that begins with `/`, `./`, `../` or `~`. Others may be names on the Hub.
    """
    means_one = isinstance(path, Path) or path.startswith(("/", "./", "../", "~"))
    if means_one and not Path(path).is_dir():
        raise FormatError(f"{path}: no such directory")


def load_model(
    cls: Any, model: str, quant: str, dtype: str, block_size: int = 64, double_quant: bool = True, **options: Any
) -> Any:
    """Load a model by a transformers auto class, quantized as it loads; one that is stored quantized stays as it is.

    Args:
        cls: a transformers auto class, for instance `AutoModelForCausalLM`.
        model: directory or name on the Hub.
        quant: one of `QUANT_CHOICES`.
        dtype: one of `DTYPES`; "auto" is the type the model was stored in.
        block_size: as in `QuantSpec`.
        double_quant: as in `QuantSpec`.
        **options: for `from_pretrained`, or for the model's configuration (`num_labels`).
    """
    from ferrolora.integrations.transformers import FerroloraConfig, read_config

    config = read_config(model)
    for name in [name for name in options if hasattr(config, name)]:  # beside a config, transformers takes none of them
        setattr(config, name, options.pop(name))
    if quant != "none" and getattr(config, "quantization_config", None) is None:
        spec = QuantSpec(quant, block_size, double_quant)
        options["quantization_config"] = FerroloraConfig.from_spec(spec)
    return cls.from_pretrained(model, config=config, dtype=dtype, **options)


def load_tokenizer(model: str) -> Any:
    """The tokenizer that belongs to a model directory or name."""
    from transformers import AutoTokenizer

    if Path(model).is_dir() and not any(Path(model).glob("*token*")) and not any(Path(model).glob("vocab.*")):
        raise FormatError(f"{model}: holds no tokenizer (tokenizer.json, …); copy its files from the original model")
    return AutoTokenizer.from_pretrained(model)
