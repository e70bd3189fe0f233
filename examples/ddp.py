"""QLoRA in two or more processes, the gradients averaged by DDP; on the CPU by gloo, on GPUs by nccl.

    torchrun --nproc-per-node 2 examples/ddp.py MODEL_DIRECTORY OUTPUT [--quant-type int8] [--steps 4]

Every process holds the packed base whole; only the adapter's gradients travel. The loss of each step is printed.
On two machines, on both, HOST being the name of one of them:

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29500 examples/ddp.py …
"""

import argparse

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from transformers import AutoModelForCausalLM

import ferrolora as fl


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--quant-type", default="nf4")
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    # The scales of the packed weights are buffers that never change: DDP need not send them at every step.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
    config = fl.FerroloraConfig(options.quant_type)
    base = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config)
    torch.manual_seed(0)  # the same adapter everywhere
    model = fl.get_peft_model(base, fl.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    # Stands for a tokenized data set: the same four rows again and again.
    rows = (torch.arange(4 * 8).view(4, 8) % base.config.vocab_size).repeat(options.steps, 1)
    loader = torch.utils.data.DataLoader(rows, batch_size=4 // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for ids in loader:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"loss {accelerator.reduce(loss.detach(), 'mean'):.6f}")
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(options.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
