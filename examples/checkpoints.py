"""Checkpoints of ferrolora and of bitsandbytes: quantize shard by shard, load, label for bitsandbytes, load that again.

    python examples/checkpoints.py FLOAT_MODEL_DIRECTORY OUTPUT

OUTPUT/nf4 is a checkpoint of ferrolora, OUTPUT/bitsandbytes the same bytes with bitsandbytes' label, which transformers
loads with bitsandbytes, and ferrolora without it. The command line does the same: `ferrolora quantize`,
`ferrolora export bitsandbytes`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import ferrolora as fl
from ferrolora.integrations.checkpoint_names import linear_tensors
from ferrolora.integrations.transformers import read_config
from ferrolora.io.bitsandbytes import export_checkpoint
from ferrolora.io.quantize_checkpoint import quantize_checkpoint

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
parser.add_argument("output", type=Path)
options = parser.parse_args()

# Shard in, shard out: the memory this needs is one tensor. A run that was killed goes on where it was.
config = fl.FerroloraConfig("nf4", double_quant=True)
weights = linear_tensors(options.model).weights
summary = quantize_checkpoint(options.model, options.output / "nf4", weights, config.spec, config.to_dict())
print(f"{summary.quantized} weights quantized, {summary.bytes_before} bytes -> {summary.bytes_after}")

model = AutoModelForCausalLM.from_pretrained(options.output / "nf4")  # ferrolora is imported: that is all it needs
on_the_fly = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config)

export_checkpoint(options.output / "nf4", options.output / "bitsandbytes")
labelled = read_config(options.output / "bitsandbytes")  # reads bitsandbytes' label as ours
read_back = AutoModelForCausalLM.from_pretrained(options.output / "bitsandbytes", config=labelled)

ids = torch.arange(8)[None]
with torch.no_grad():
    first, second, third = (m(input_ids=ids).logits for m in (model, on_the_fly, read_back))
print(f"logits differ by {float((first - second).abs().max())} and {float((first - third).abs().max())}")
assert torch.equal(first, second)
assert torch.equal(first, third)
