"""Direct preference optimization with TRL over a 4-bit base, without a second copy of the model.

    python examples/dpo.py MODEL_DIRECTORY OUTPUT [--steps 50]

The reference that DPO compares with is the same base with its adapter switched off.
"""

import argparse

import peft
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import ferrolora as fl
from ferrolora.integrations.peft import accelerate

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("output")
parser.add_argument("--steps", type=int, default=50)
options = parser.parse_args()

base = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=fl.FerroloraConfig())
model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
accelerate(model)

# Stands for your data: which of two answers is the better one.
pairs = {"prompt": ["is it hot? ", "is it cold? "], "chosen": ["yes.", "no."], "rejected": ["what?", "go on."]}
trainer = DPOTrainer(
    model,
    args=DPOConfig(options.output, max_steps=options.steps, per_device_train_batch_size=2, learning_rate=1e-3,
                   logging_steps=1, report_to="none", bf16=False, use_cpu=True,
                   activation_checkpointing=False),
    train_dataset=Dataset.from_dict({key: rows * 4 for key, rows in pairs.items()}),
    processing_class=AutoTokenizer.from_pretrained(options.model),
)  # fmt: skip
assert trainer.ref_model is None
trainer.train()
trainer.save_model(options.output)
