"""accelerate: processes train what one does on the joint batch; weights that wait on the CPU come when needed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import ferrolora as fl
from tiny import processes
from tiny.models import llama, logits, token_ids
from tiny.traffic import Traffic
from tiny.training import assert_trained_alike, losses

EXAMPLE = Path(__file__).resolve().parents[3] / "examples/ddp.py"

# The first of these tests waits until the server of processes has imported everything.
pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_two_processes_train_the_adapter_of_one_on_the_joint_batch(quant_type: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    printed = {}
    for ranks in (1, 2):
        arguments = [tmp_path / "float", tmp_path / str(ranks), "--quant-type", quant_type]
        printed[ranks] = processes.run(EXAMPLE, arguments, tmp_path / "output", ranks)[0]
    assert_trained_alike(losses(printed[2]), losses(printed[1]), tmp_path / "2", tmp_path / "1")


@pytest.mark.slow
def test_torchrun_on_two_nodes_trains_as_one_process_does(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    alone = processes.run(EXAMPLE, [tmp_path / "float", tmp_path / "one"], tmp_path / "output", 1)[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "127.0.0.1"]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    command = [sys.executable, *launcher, *rendezvous, EXAMPLE, tmp_path / "float", tmp_path / "two"]
    nodes = [
        subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=200) for node in nodes]
    finally:
        for node in nodes:
            node.terminate()  # torchrun takes its workers with it
            node.wait()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    for printed, _ in outputs:
        assert_trained_alike(losses(printed), losses(alone), tmp_path / "two", tmp_path / "one")


def bytes_of_a_step(broadcast_buffers: bool) -> dict[tuple[str, torch.dtype], int]:
    """In each process: what its third step under DDP sends; for the second DDP agrees on its buckets."""
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = llama()
    fl.quantize_model(model)
    adapted = fl.get_peft_model(model, fl.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    parallel = DistributedDataParallel(adapted, broadcast_buffers=broadcast_buffers)
    for _ in range(3):
        with Traffic() as traffic:
            parallel(input_ids=token_ids(), labels=token_ids()).loss.backward()
    torch.distributed.destroy_process_group()
    return dict(traffic.bytes)


def test_a_step_under_ddp_sends_the_adapters_gradients_and_by_default_the_buffers(tmp_path: Path) -> None:
    model = llama()
    fl.quantize_model(model)
    shapes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, fl.nn.QuantLinear)]
    gradients = sum(4 * 4 * (inputs + outputs) for inputs, outputs in shapes)
    buffers: dict[tuple[str, torch.dtype], int] = {}
    for buffer in model.buffers():
        key = ("broadcast", buffer.dtype)
        buffers[key] = buffers.get(key, 0) + buffer.nbytes
    quiet = processes.call(__file__, "bytes_of_a_step", [False], tmp_path)
    assert quiet == [{("allreduce", torch.float32): gradients}] * 2
    default = processes.call(__file__, "bytes_of_a_step", [True], tmp_path)
    assert default == [{("allreduce", torch.float32): gradients, **buffers}] * 2


def losses_under_trainer(directory: Path) -> list[float]:
    """In each process: transformers' Trainer on its share of batches of four rows; writes the adapter."""
    torch.manual_seed(0)
    model = llama()
    fl.quantize_model(model)
    adapted = fl.get_peft_model(model, fl.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(directory),
        per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]),
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        ddp_broadcast_buffers=False,
        report_to="none",
        disable_tqdm=True,
    )
    rows = torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(2))
    trainer = Trainer(adapted, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    trainer.save_model(str(directory))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_in_two_processes_trains_as_in_one(tmp_path: Path) -> None:
    seen = {}
    for ranks in (1, 2):
        arguments = [tmp_path / str(ranks)]
        seen[ranks] = processes.call(__file__, "losses_under_trainer", arguments, tmp_path / "output", ranks)[0]
    assert len(seen[1]) == 4
    assert seen[2] == pytest.approx(seen[1], abs=2e-5)  # the roundings of `assert_trained_alike`
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("1", "2"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("scales", [False, True])
def test_weights_offloaded_by_accelerates_hooks_give_the_same_logits(scales: bool) -> None:
    model = llama()
    fl.quantize_model(model)
    expected = logits(model)
    # accelerate looks buffers up by their names in memory, and a packed layer's state dict has bitsandbytes' names
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    cpu_offload(model, torch.device("cpu"), offload_buffers=scales, state_dict=tensors if scales else None)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.device.type == "meta"
    assert (layer.weight_absmax.device.type == "meta") == scales
    assert torch.equal(logits(model), expected)
