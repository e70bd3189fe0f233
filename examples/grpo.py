"""Group relative policy optimization with TRL over a 4-bit base: learning from a reward that is a Python function.

    python examples/grpo.py MODEL_DIRECTORY OUTPUT [--steps 10]

Answers are drawn with `generate` on the packed base; no vLLM is needed.
"""

import argparse

import peft
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import ferrolora as fl
from ferrolora.integrations.peft import accelerate

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("output")
parser.add_argument("--steps", type=int, default=10)
options = parser.parse_args()


def reward(completions: list[str], **columns: object) -> list[float]:
    """More different letters are better."""
    return [float(len(set(text))) for text in completions]


base = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=fl.FerroloraConfig())
model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
accelerate(model)

trainer = GRPOTrainer(
    model,
    reward_funcs=reward,
    args=GRPOConfig(options.output, max_steps=options.steps, per_device_train_batch_size=4, num_generations=4,
                    max_completion_length=8, learning_rate=1e-3, logging_steps=1, report_to="none", bf16=False,
                    use_cpu=True, activation_checkpointing=False),
    train_dataset=Dataset.from_dict({"prompt": ["see the ", "he went "] * 8}),
    processing_class=AutoTokenizer.from_pretrained(options.model),
)  # fmt: skip
trainer.train()
trainer.save_model(options.output)
