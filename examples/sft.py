"""Supervised fine-tuning with TRL over a 4-bit base.

    python examples/sft.py MODEL_DIRECTORY OUTPUT [--steps 50]

The checkpoints in OUTPUT hold the adapter alone; run again with `--resume` to go on from the last one.
"""

import argparse

import peft
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import ferrolora as fl
from ferrolora.integrations.peft import accelerate

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("output")
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--resume", action="store_true")
options = parser.parse_args()

base = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=fl.FerroloraConfig())
model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
accelerate(model)  # each LoRA layer and its packed base in one operation

# Stands for your data: rows of text, or of "messages", or of "prompt" and "completion".
text = ["the cat sat on the mat", "the dog lay on the rug", "a bird is in the tree", "a fish is in the sea"]
trainer = SFTTrainer(
    model,
    SFTConfig(options.output, max_steps=options.steps, per_device_train_batch_size=2, learning_rate=1e-3,
              logging_steps=1, save_steps=max(options.steps // 2, 1), report_to="none", bf16=False,
              use_cpu=True, activation_checkpointing=False),
    train_dataset=Dataset.from_dict({"text": text * 4}),
    processing_class=AutoTokenizer.from_pretrained(options.model),
)  # fmt: skip
trainer.train(resume_from_checkpoint=options.resume)
trainer.save_model(options.output)
