"""PEFT's own models over a 4-bit base: any of its methods, one fused operation for LoRA, and a merged float model.

python examples/peft_route.py MODEL_DIRECTORY OUTPUT [--method lora|loha]

The adapter goes to OUTPUT/adapter in PEFT's format.
"""

import argparse

import peft
import torch
from transformers import AutoModelForCausalLM

import ferrolora as fl
from ferrolora.integrations.peft import accelerate, prepare

CONFIGS = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig}
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("output")
parser.add_argument("--method", choices=CONFIGS, default="lora")
options = parser.parse_args()

base = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=fl.FerroloraConfig())
prepare(base)  # methods that look at the weight (LoHa, LoKr, …) see floats
config = CONFIGS[options.method](r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
model = peft.get_peft_model(base, config)
accelerate(model)  # LoRA in one operation; merging exact for every method

ids = torch.arange(16).view(2, 8)  # stands for a batch of tokens
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(4):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {float(loss.detach()):.4f}")

model.save_pretrained(f"{options.output}/adapter")
model.eval()
before = model(input_ids=ids).logits.detach()
merged = model.merge_and_unload()  # float layers where there were adapters: decoded weight + update
after = merged(input_ids=ids).logits.detach()
print(f"merging changed the logits by at most {float((after - before).abs().max()):.1e}")
assert torch.allclose(after, before, atol=1e-3)
