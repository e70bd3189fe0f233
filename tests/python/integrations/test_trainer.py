"""`transformers.Trainer` over a base that `from_pretrained` quantized: train, checkpoint, resume, save the adapter."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

import ferrolora as fl
from tiny.models import llama, logits


def peft_model(folder: Path) -> fl.PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=fl.FerroloraConfig())
    torch.manual_seed(1)
    config = fl.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    return fl.get_peft_model(base, config)


def trainer(model: fl.PeftModel, output: Path) -> Trainer:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(0, 64, (16, 8), generator=generator)
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        use_cpu=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    made = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    made.remove_callback(PrinterCallback)
    return made


def losses(done: Trainer) -> list[float]:
    return [entry["loss"] for entry in done.state.log_history if "loss" in entry]


def test_a_resumed_run_has_the_losses_and_the_adapter_of_an_uninterrupted_one(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    whole = trainer(peft_model(tmp_path / "float"), tmp_path / "whole")
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]

    checkpoint = tmp_path / "whole/checkpoint-3"
    resumed = trainer(peft_model(tmp_path / "float"), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)

    whole.save_model(str(tmp_path / "adapter"))
    resumed.model.save_pretrained(str(tmp_path / "resumed-adapter"))
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "resumed-adapter")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=fl.FerroloraConfig())
    again = fl.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(whole.model))


def test_a_checkpoint_is_the_adapter_and_not_the_base(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    model = peft_model(tmp_path / "float")
    trainer(model, tmp_path / "out").train()
    names = set()
    for file in (tmp_path / "out/checkpoint-6").glob("*.safetensors"):
        names |= load_file(file).keys()
    assert names
    assert all("lora_" in name for name in names)
