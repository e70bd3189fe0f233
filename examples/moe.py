"""A mixture of experts in 4 bits, with LoRA on its attention and on each of its experts.

    python examples/moe.py [directory]

Makes a tiny model of Qwen3-MoE's architecture, so nothing is downloaded. For a real one give `from_pretrained` its name
instead: the routers and the output head stay in float, everything else takes 4.13 bits a weight.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import ferrolora as fl

directory = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()

# 1. A checkpoint as it lies on the Hub: in float, each expert by itself.
torch.manual_seed(0)
sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
sizes |= {"num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 8}
Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts_per_tok=2, **sizes)).save_pretrained(f"{directory}/base")


def load_base() -> torch.nn.Module:
    """The checkpoint in NF4; experts are packed as they arrive, a layer's at a time."""
    config = fl.FerroloraConfig(quant_type="nf4")
    return AutoModelForCausalLM.from_pretrained(f"{directory}/base", quantization_config=config, dtype=torch.float32)


# 2. LoRA: modules by target_modules, the experts' fused parameters by target_parameters.
config = fl.LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["experts.gate_up_proj", "experts.down_proj"],
)
model = fl.get_peft_model(fl.prepare_model_for_kbit_training(load_base()), config)
model.print_trainable_parameters()

# 3. A few steps on one batch.
tokens = torch.randint(0, 128, (4, 16))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model.train()
for step in range(10):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

# 4. Save the adapter (PEFT reads the file too) and load it again.
model.eval().save_pretrained(f"{directory}/adapter")
again = fl.PeftModel.from_pretrained(load_base(), f"{directory}/adapter").eval()
with torch.no_grad():
    same = torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
print(f"same logits after reloading: {same}")
