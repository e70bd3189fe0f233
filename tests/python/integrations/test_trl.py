"""TRL's trainers over packed bases: a PEFT model, and one that is accelerated."""

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
from ferrolora.integrations.peft import accelerate
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


@pytest.mark.parametrize("kind", ["peft", "peft, accelerated"])
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


@pytest.mark.parametrize("kind", ["peft", "peft, accelerated"])
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
