"""`import ferrolora` alone makes quantized models loadable, whichever of the two libraries is imported first."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import ferrolora as fl
from tiny.models import llama

LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear", model
registry = sys.modules["transformers.quantizers.auto"]
assert type(registry.__loader__).__module__ == "_frozen_importlib_external", registry.__loader__
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("ferrolora")]
"""
ORDERS = {
    "ferrolora first": "import sys, ferrolora\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "import sys\nfrom transformers import AutoModelForCausalLM, modeling_utils\nimport ferrolora",
}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_a_saved_model_loads_without_naming_the_config(tmp_path: Path, order: str) -> None:
    llama().save_pretrained(tmp_path / "float")
    config = fl.FerroloraConfig()
    AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).save_pretrained(tmp_path / "q")
    done = run(order + LOAD, str(tmp_path / "q"))
    assert done.returncode == 0, done.stderr


def test_importing_ferrolora_imports_no_transformers() -> None:
    code = "import sys, ferrolora\nassert not [m for m in sys.modules if m.split('.')[0] == 'transformers']"
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_registry_imported_alone_knows_ferrolora() -> None:
    code = (
        "import ferrolora, transformers.quantizers.auto as registry\n"
        "assert registry.AUTO_QUANTIZER_MAPPING['ferrolora'].__name__ == 'FerroloraQuantizer'"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
