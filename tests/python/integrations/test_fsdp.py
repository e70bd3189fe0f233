"""FSDP2 divides packed weights over processes, trains as one process does, and the adapter is gathered for its file."""

import gc
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn

import ferrolora as fl
from ferrolora.errors import TargetError, UnsupportedError
from ferrolora.integrations.peft import accelerate
from ferrolora.integrations.sharding import Sharding, adapter_state_dict, shard
from tiny import processes
from tiny.models import llama, token_ids
from tiny.traffic import Traffic
from tiny.training import assert_trained_alike, losses

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"

# The first of these tests waits until the server of processes has imported everything.
pytestmark = pytest.mark.timeout(240)
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def adapted(spec: fl.QuantSpec, checkpointing: bool = False) -> fl.PeftModel:
    torch.manual_seed(0)
    model = llama()
    fl.quantize_model(model, spec)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return fl.get_peft_model(model, fl.LoraConfig(**LORA))


def packed(model: nn.Module) -> list[fl.nn.QuantLinear]:
    return [module for module in model.modules() if isinstance(module, fl.nn.QuantLinear)]


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_two_processes_train_the_adapter_of_one_on_the_joint_batch(quant_type: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "float")
    printed = {}
    for script, ranks in (("ddp.py", 1), ("fsdp.py", 2)):  # the first is plain training in one process
        arguments = [tmp_path / "float", tmp_path / script, "--quant-type", quant_type]
        printed[script] = processes.run(EXAMPLES / script, arguments, tmp_path / "output", ranks)[0]
    assert "scales and other buffers are not sharded and cost" in printed["fsdp.py"]
    assert_trained_alike(
        losses(printed["fsdp.py"]), losses(printed["ddp.py"]), tmp_path / "fsdp.py", tmp_path / "ddp.py"
    )


def held_after_a_step(spec: fl.QuantSpec) -> tuple[Sharding, int]:
    """In each process: what `shard` says, and the bytes of all living tensors of the codes' type after a step."""
    dist.init_process_group("gloo")
    model = adapted(spec)
    codes = packed(model)[0].weight.dtype
    sharding = shard(model)
    loss_of(model, token_ids()).backward()
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter))
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t.dtype is codes}
    dist.destroy_process_group()
    return sharding, sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "ranks"),
    [(fl.QuantSpec(double_quant=False), 3), (fl.QuantSpec("int8"), 2)],  # uint8 and int8 are then codes alone
    ids=["nf4", "int8"],
)
def test_each_process_holds_its_share_of_the_codes_and_all_scales(
    spec: fl.QuantSpec, ranks: int, tmp_path: Path
) -> None:
    model = adapted(spec)
    parameters = list(model.parameters())
    ceilings = {p: -(-p.shape[0] // ranks) * (p.nbytes // p.shape[0]) for p in parameters}  # shards end with a row
    seen = processes.call(__file__, "held_after_a_step", [spec], tmp_path, ranks)
    assert sum(sharding.held for sharding, _ in seen) == sum(p.nbytes for p in parameters)
    for sharding, living in seen:
        assert living == sum(ceilings[layer.codes] for layer in packed(model))
        assert sharding.held <= sum(ceilings.values())
        assert sharding.replicated == sum(buffer.nbytes for buffer in model.buffers())
        assert sharding.total == sum(p.nbytes for p in parameters)
        assert sharding.processes == ranks


def save_sharded(directory: Path) -> str:
    """In each process: saves without a step in between; returns what saving without gathering says."""
    dist.init_process_group("gloo")
    model = adapted(fl.QuantSpec())
    shard(model)
    message = ""
    try:
        model.save_pretrained(directory / "parts")
    except UnsupportedError as error:
        message = str(error)
    first = dist.get_rank() == 0
    model.save_pretrained(directory / "sharded", is_main_process=first, state_dict=adapter_state_dict(model))
    dist.destroy_process_group()
    return message


def test_the_gathered_file_has_the_bytes_of_an_undivided_models_and_parts_are_refused(tmp_path: Path) -> None:
    adapted(fl.QuantSpec()).save_pretrained(tmp_path / "whole")
    messages = processes.call(__file__, "save_sharded", [tmp_path], tmp_path / "output")
    assert all("adapter_state_dict" in message for message in messages)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def bytes_of_a_step() -> dict[tuple[str, torch.dtype], int]:
    """In each process: what its second step sends."""
    dist.init_process_group("gloo")
    model = adapted(fl.QuantSpec())
    shard(model)
    for _ in range(2):
        with Traffic() as traffic:
            loss_of(model, token_ids()).backward()
    dist.destroy_process_group()
    return dict(traffic.bytes)


def test_a_step_gathers_the_packed_blocks_twice_and_scatters_the_adapters_gradients(tmp_path: Path) -> None:
    model = adapted(fl.QuantSpec())
    blocks = sum(p.nbytes for p in model.get_base_model().model.layers.parameters())
    rest = sum(p.nbytes for p in model.parameters()) - blocks  # embeddings, norm, head
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    expected = {
        ("allgather", torch.uint8): 2 * blocks // 2,  # forward and backward; each of two processes gives its half
        ("allgather", torch.float32): rest // 2,
        ("reduce_scatter", torch.float32): gradients,
    }
    assert processes.call(__file__, "bytes_of_a_step", [], tmp_path) == [expected] * 2


def losses_of(kind: str, parallel: bool) -> list[float]:
    """In each process: four losses of SGD on its share of the rows; the mean over processes."""
    dist.init_process_group("gloo")
    model: Any = adapted(fl.QuantSpec(), kind == "checkpointing")
    if kind == "peft":
        torch.manual_seed(0)
        base = llama()
        fl.quantize_model(base)
        model = peft.get_peft_model(base, peft.LoraConfig(**LORA))
        accelerate(model)
    if parallel:
        shard(model)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.arange(32).view(4, 8).chunk(dist.get_world_size())[dist.get_rank()]
    seen = []
    for _ in range(4):
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        seen.append(mean.item())
    assert all(value.shape[0] > 0 for value in adapter_state_dict(model).values())
    dist.destroy_process_group()
    return seen


@pytest.mark.parametrize("kind", ["checkpointing", "peft"])
def test_gradient_checkpointing_and_pefts_own_model_train_alike(kind: str, tmp_path: Path) -> None:
    alone = processes.call(__file__, "losses_of", [kind, False], tmp_path, 1)[0]
    assert alone[-1] < alone[0]
    for seen in processes.call(__file__, "losses_of", [kind, True], tmp_path):
        # As in tiny.training: roundings of float32 losses of order 4.
        assert seen == pytest.approx(alone, abs=2e-5)


def test_a_model_that_names_no_blocks_is_refused() -> None:
    with pytest.raises(TargetError, match=r"Sequential.*give `blocks`"):
        shard(nn.Sequential(nn.Linear(4, 4)))


def test_an_undivided_adapter_is_copied() -> None:
    model = adapted(fl.QuantSpec())
    found = adapter_state_dict(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, value in found.items():
        assert torch.equal(value, model.get_parameter(name))
        assert value.data_ptr() != model.get_parameter(name).data_ptr()


def test_virtual_tokens_are_not_gathered() -> None:
    config = fl.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedError, match="'default' has virtual tokens"):
        adapter_state_dict(fl.get_peft_model(llama(), config))
