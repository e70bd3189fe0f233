"""QLoRA by Ray Train: workers on one machine or on a cluster, the gradients averaged by DDP.

    python examples/ray_train.py MODEL_DIRECTORY OUTPUT [--workers 2] [--steps 4]

Without a running Ray a local one is started. All workers must see MODEL_DIRECTORY and OUTPUT. Each holds the packed
base whole; only the adapter's gradients travel. Prints the losses, then where the adapter is.
"""

import argparse
import os
import tempfile
from typing import Any

from ray.train import Checkpoint, RunConfig, ScalingConfig, get_context, report
from ray.train.torch import TorchTrainer


def train(options: dict[str, Any]) -> None:  # in every worker, which Ray has joined to a process group
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from transformers import AutoModelForCausalLM

    import ferrolora as fl

    rank, workers = get_context().get_world_rank(), get_context().get_world_size()
    base = AutoModelForCausalLM.from_pretrained(options["model"], quantization_config=fl.FerroloraConfig())
    torch.manual_seed(0)  # the same adapter everywhere
    model = fl.get_peft_model(base, fl.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    # Stands for a tokenized data set: the same four rows at every step, each worker its share of them.
    rows = (torch.arange(4 * 8).view(4, 8) % base.config.vocab_size).chunk(workers)[rank]
    losses = torch.zeros(options["steps"])
    for step in range(options["steps"]):
        loss = parallel(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = loss.detach() / workers
    torch.distributed.all_reduce(losses)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, is_main_process=rank == 0)
        report({"losses": losses.tolist()}, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    options = vars(parser.parse_args())
    run = RunConfig(storage_path=os.path.abspath(options["output"]))
    scaling = ScalingConfig(num_workers=options["workers"])
    result = TorchTrainer(train, train_loop_config=options, scaling_config=scaling, run_config=run).fit()
    print(*(f"loss {loss:.6f}" for loss in result.metrics["losses"]), result.checkpoint.path, sep="\n")


if __name__ == "__main__":
    main()
