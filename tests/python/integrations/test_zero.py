"""DeepSpeed's ZeRO on the CPU: stage 2 divides gradients and optimizer state, stage 3 also parameters, packed or not.

DeepSpeed would compile an operator for messages through shared memory, with ninja and a C++ compiler; here it must not.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ferrolora as fl
from ferrolora.errors import UnsupportedError
from ferrolora.integrations.sharding import adapter_state_dict
from tiny import processes
from tiny.models import llama, token_ids
from tiny.training import assert_trained_alike, losses

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"

# The first of these tests waits until the server of processes has imported everything.
pytestmark = pytest.mark.timeout(240)


def without_compiler() -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def example(*arguments: str) -> None:
    """In each process: examples/zero.py."""
    without_compiler()
    sys.argv = [str(EXAMPLES / "zero.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "quant_type"), [(2, "nf4"), (3, "nf4"), (3, "int8")])
def test_two_processes_train_the_adapter_of_one_on_the_joint_batch(stage: int, quant_type: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    plain = [tmp_path / "float", tmp_path / "plain", "--quant-type", quant_type]
    alone = processes.run(EXAMPLES / "ddp.py", plain, tmp_path / "output", 1)[0]
    arguments = [tmp_path / "float", tmp_path / "zero", "--quant-type", quant_type, "--stage", stage]
    processes.call(__file__, "example", [str(part) for part in arguments], tmp_path / "output")
    printed = (tmp_path / "output/rank0.txt").read_text()
    assert_trained_alike(losses(printed), losses(alone), tmp_path / "zero", tmp_path / "plain")


def held_after_a_step(stage: int, directory: Path) -> dict[str, Any]:
    """In each process: bytes of its parts of codes, adapter and optimizer state; what saving without gathering says."""
    without_compiler()
    import deepspeed

    torch.manual_seed(0)
    base = llama()
    fl.quantize_model(base)
    model = fl.get_peft_model(base, fl.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained), config=config, dist_init_required=True
    )
    engine.backward(engine(input_ids=token_ids(), labels=token_ids()).loss)
    engine.step()
    parts = [getattr(p, "ds_tensor", p) for p in model.parameters()]
    message = ""
    try:
        model.save_pretrained(directory / f"parts{torch.distributed.get_rank()}")
    except UnsupportedError as error:
        message = str(error)
    gathered = adapter_state_dict(model)
    torch.distributed.destroy_process_group()
    return {
        "codes": sum(p.nbytes for p in parts if p.dtype is torch.uint8),
        "adapter": sum(p.nbytes for p, whole in zip(parts, model.parameters(), strict=True) if whole.requires_grad),
        "moments": sum(value["exp_avg"].nbytes for value in optimizer.optimizer.state.values()),
        "gathered": sum(value.nbytes for value in gathered.values()),
        "message": message,
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_stage_2_divides_the_optimizers_state_and_stage_3_the_packed_weights_too(stage: int, tmp_path: Path) -> None:
    model = llama()
    fl.quantize_model(model)
    packed = [module for module in model.modules() if isinstance(module, fl.nn.QuantLinear)]
    codes = sum(layer.weight.nbytes for layer in packed)
    adapter = sum(4 * 4 * (layer.in_features + layer.out_features) for layer in packed)
    for seen in processes.call(__file__, "held_after_a_step", [stage, tmp_path], tmp_path / "output"):
        assert seen["codes"] == (codes if stage == 2 else codes // 2)
        assert seen["adapter"] == (adapter if stage == 2 else adapter // 2)
        assert seen["moments"] == adapter // 2
        assert seen["gathered"] == adapter
        assert ("adapter_state_dict" in seen["message"]) == (stage == 3)
