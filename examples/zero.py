"""QLoRA under DeepSpeed's ZeRO-2 or ZeRO-3, by accelerate; on the CPU by gloo, on GPUs by nccl.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 examples/zero.py MODEL_DIRECTORY OUTPUT [--stage 3] [--steps 4]

Stage 2 divides the adapter's gradients and optimizer state; stage 3 also every parameter, the packed weights included.
On the CPU DeepSpeed compiles an operator at the first start, which needs `pip install ninja` and a C++ compiler.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from transformers import AutoModelForCausalLM

import ferrolora as fl
from ferrolora.integrations.sharding import adapter_state_dict


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--quant-type", default="nf4")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    zero = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": options.stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,  # torch's own; DeepSpeed's for the CPU would have to be compiled
        "zero_force_ds_cpu_optimizer": False,
    }
    # Named, since accelerate asks for none on a machine without a GPU, and then counts one process.
    group = InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero), kwargs_handlers=[group])
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
        accelerator.print(f"loss {accelerator.gather(loss.detach().view(1)).mean():.6f}")
    trained = accelerator.unwrap_model(model)
    adapter = adapter_state_dict(trained)  # in every process: each has a part
    trained.save_pretrained(options.output, is_main_process=accelerator.is_main_process, state_dict=adapter)
    accelerator.end_training()


if __name__ == "__main__":
    main()
