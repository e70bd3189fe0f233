"""TRL's trainers over packed bases: a PEFT model, one that is accelerated, and one of ours; and the examples."""

import runpy
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import ferrolora as fl
from ferrolora.integrations.peft import accelerate, to_peft
from ferrolora.nn import QuantLinear
from tiny.folders import save, tokenizer
from tiny.models import llama

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
COMMON: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "activation_checkpointing": False,
}
KINDS = ["peft", "peft, accelerated", "ours"]
ROOT = Path(__file__).parents[3]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def base(directory: Path) -> Any:
    if not directory.exists():
        save(llama(), directory)
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=fl.FerroloraConfig())


def model(kind: str, directory: Path) -> Any:
    quantized = base(directory)
    torch.manual_seed(1)
    if kind == "ours":
        return to_peft(fl.get_peft_model(quantized, fl.LoraConfig(**LORA)))
    made = peft.get_peft_model(quantized, peft.LoraConfig(**LORA))
    if kind == "peft, accelerated":
        assert accelerate(made) == 4
    return made


def sft(kind: str, directory: Path, output: Path) -> SFTTrainer:
    text = Dataset.from_dict({"text": ["abc def", "hello", "what is it", "ab ab ab"] * 2})
    made = SFTTrainer(
        model(kind, directory), SFTConfig(str(output), **COMMON), train_dataset=text, processing_class=tokenizer()
    )
    made.remove_callback(PrinterCallback)
    return made


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.integration("trl", "SFTTrainer, resumed: {kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_supervised_training_resumes_from_a_checkpoint_that_is_the_adapter_alone(kind: str, tmp_path: Path) -> None:
    whole = sft(kind, tmp_path / "float", tmp_path / "whole")
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    checkpoint = tmp_path / "whole/checkpoint-2"
    stored = {key for file in checkpoint.glob("*.safetensors") for key in load_file(file)}
    assert stored
    assert all("lora_" in key for key in stored)
    resumed = sft(kind, tmp_path / "float", tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)


@pytest.mark.integration("trl", "DPOTrainer: {kind}")
@pytest.mark.parametrize("kind", KINDS)
def test_preference_training_starts_from_indifference_and_uses_no_second_copy(kind: str, tmp_path: Path) -> None:
    pairs = Dataset.from_dict(
        {"prompt": ["ab ", "cd "] * 4, "chosen": ["good", "fine"] * 4, "rejected": ["x", "y"] * 4}
    )
    trainer = DPOTrainer(
        model(kind, tmp_path / "float"),
        args=DPOConfig(str(tmp_path / "out"), **COMMON),
        train_dataset=pairs,
        processing_class=tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    assert trainer.ref_model is None
    assert sum(isinstance(module, QuantLinear) for module in trainer.model.modules()) == 14
    trainer.train()
    # policy and reference are the same model before the first step: -log sigmoid(0)
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses(trainer)[-1] < losses(trainer)[0]


def example(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """Runs an example in this process; returns its variables."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.mark.integration("trl", "examples/{name}")
@pytest.mark.parametrize("name", ["sft.py", "dpo.py", "grpo.py"])
def test_an_example_trains_the_adapter_and_saves_it_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(llama(max_position_embeddings=128), tmp_path / "float")
    trainer = example(name, monkeypatch, str(tmp_path / "float"), str(tmp_path / "out"), "--steps", "2")["trainer"]
    assert trainer.state.global_step == 2
    assert sum(isinstance(module, QuantLinear) for module in trainer.model.modules()) == 14
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    assert any(key.endswith("lora_B.weight") and value.abs().sum() > 0 for key, value in stored.items())
    assert all("lora_" in key for key in stored)


@pytest.mark.integration("peft", "examples/peft_route.py --method {method}")
@pytest.mark.parametrize("method", ["lora", "loha"])
def test_the_example_of_pefts_route_trains_and_merges(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(llama(), tmp_path / "float")
    run = example("peft_route.py", monkeypatch, str(tmp_path / "float"), str(tmp_path / "out"), "--method", method)
    lines = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert lines[-1] < lines[0]
    # W + ΔW rounded once to float32, then the sums of the products in another order
    torch.testing.assert_close(run["after"], run["before"], atol=1e-5, rtol=0)
