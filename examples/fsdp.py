"""QLoRA with the packed base divided over the processes by FSDP2; on the CPU by gloo, on GPUs by nccl.

    torchrun --nproc-per-node 2 examples/fsdp.py MODEL_DIRECTORY OUTPUT [--quant-type int8] [--steps 4]

Each process keeps a part of every packed weight, and gathers a layer while it computes. The losses are printed.
"""

import argparse
import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import ferrolora as fl
from ferrolora.integrations.sharding import adapter_state_dict, shard


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--quant-type", default="nf4")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    config = fl.FerroloraConfig(options.quant_type)
    base = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config, device_map=device)
    torch.manual_seed(0)  # the same adapter everywhere
    model = fl.get_peft_model(base, fl.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    print(shard(model))  # before the optimizer, which must hold the parts
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)

    # Stands for a tokenized data set: the same four rows at every step, each process its share of them.
    rows = (torch.arange(4 * 8, device=device).view(4, 8) % base.config.vocab_size).chunk(processes)[rank]
    for _ in range(options.steps):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / processes
        dist.all_reduce(mean)
        if rank == 0:
            print(f"loss {mean:.6f}")
    adapter = adapter_state_dict(model)  # in every process: each has a part
    model.save_pretrained(options.output, is_main_process=rank == 0, state_dict=adapter)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
