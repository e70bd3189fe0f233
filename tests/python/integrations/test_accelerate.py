"""accelerate: two processes train what one does on the joint batch; weights that wait on the CPU come when needed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file

import ferrolora as fl
from tiny.models import llama, logits

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def run(processes: int, model: Path, output: Path) -> list[float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, EXAMPLES / "ddp.py", model, output]
    done = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss ")]


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one_on_the_joint_batch(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    alone = run(1, tmp_path / "float", tmp_path / "one")
    together = run(2, tmp_path / "float", tmp_path / "two")
    assert len(alone) == 4
    assert alone[-1] < alone[0]
    # The mean of two means of 14 float32 losses of order 4 is their mean up to a few roundings, carried over 4 steps.
    assert together == pytest.approx(alone, abs=2e-5)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
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
