import subprocess
import sys

import pytest

import ferrolora as fl


def test_the_operators_and_the_layer_are_reached_from_the_package() -> None:
    for name in ("quantize", "dequantize", "linear", "LowRank", "QuantSpec", "QuantTensor", "nn", "FormatError"):
        assert getattr(fl, name) is not None
        assert name in dir(fl)
    assert fl.nn.QuantLinear.__mro__[1].__name__ == "Linear"


def test_the_version_is_the_native_modules() -> None:
    from ferrolora import _native

    assert fl.__version__ == _native.version()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ferrolora' has no attribute 'quantise'"):
        fl.quantise  # noqa: B018


@pytest.mark.slow
def test_import_loads_none_of_the_heavy_libraries() -> None:
    heavy = ("transformers", "peft", "bitsandbytes", "matplotlib", "typer", "rich", "huggingface_hub", "accelerate")
    code = f"import sys, ferrolora; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_are_also_the_builtins_a_caller_expects() -> None:
    assert issubclass(fl.ShapeError, (fl.FerroloraError, ValueError))
    assert issubclass(fl.UnsupportedError, NotImplementedError)
    assert issubclass(fl.CudaError, RuntimeError)
    assert all(issubclass(kind, ValueError) for kind in (fl.QuantizationError, fl.FormatError, fl.TargetError))
