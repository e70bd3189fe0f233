"""Models divided over processes: FSDP2 over a packed base, and adapters gathered again from FSDP2 or ZeRO-3.

FSDP2 and ZeRO-3 divide parameters, whatever their type: the packed codes too. The scales are buffers, which both
leave whole in every process. See docs/distributed.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ferrolora.errors import TargetError, UnsupportedError
from ferrolora.model.files import adapter_places
from ferrolora.model.peft_model import PeftModel
from ferrolora.model.state_dict import tensors_by_name


@dataclass(frozen=True)
class Sharding:
    """What `shard` divided and what it could not; bytes.

    Args:
        total: of all parameters, before.
        held: of this process's parts of them.
        replicated: of scales and other buffers, and of parameters without a dimension: whole in every process.
        processes: how many share the parameters.
    """

    total: int
    held: int
    replicated: int
    processes: int

    def __str__(self) -> str:
        return (
            f"FSDP2: {self.held} of {self.total} bytes of parameters are in this process, 1 of {self.processes}; "
            f"scales and other buffers are not sharded and cost {self.replicated} bytes in each process"
        )


def shard(
    model: nn.Module, blocks: Iterable[nn.Module] | None = None, mesh: Any = None, reshard_after_forward: bool = True
) -> Sharding:
    """Divide a model over processes by FSDP2: `torch.distributed.fsdp.fully_shard` on each block and on the rest.

    Call it in every process, after the adapters are in and before the optimizer is made. Each process must hold the
    same weights, whole, and keeps its part; a block's are gathered while it computes, packed as they are.

    Args:
        model: with adapters, `ferrolora.PeftModel` or `peft.PeftModel`; changed in place.
        blocks: the modules whose weights are gathered together. Default None: those that the transformers model says
            must not be split (its decoder or encoder layers).
        mesh: a `DeviceMesh`. Default None: all processes of the default process group.
        reshard_after_forward: give a block's gathered weights up after its forward, and gather them again for its
            backward. Default True. What is in no block (embeddings, head) is kept for the backward in any case.

    Raises:
        TargetError: no blocks are given, and the model names none.

    Source: PyTorch FSDP2, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    chosen = list(_blocks(model) if blocks is None else blocks)
    if not chosen:
        raise TargetError(f"{type(model).__name__} does not name its blocks (_no_split_modules); give `blocks`")
    scalars = {p for p in model.parameters() if p.dim() == 0}
    buffers = sum(buffer.nbytes for buffer in model.buffers()) + sum(p.nbytes for p in scalars)
    total = sum(p.nbytes for p in model.parameters() if p not in scalars)
    if mesh is None:
        mesh = init_device_mesh(next(model.parameters()).device.type, (torch.distributed.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh} | ({"ignored_params": scalars} if scalars else {})  # torch 2.6 lacks it
    for block in chosen:
        fully_shard(block, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, **options)
    local: list[Any] = [p for p in model.parameters() if p not in scalars]
    return Sharding(total, sum(p.to_local().nbytes for p in local), buffers, mesh.size())


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors, whole, by their names in memory, gathered from the processes of FSDP2 or ZeRO-3.

    Every process must call it, and gets all. For saving:
    `model.save_pretrained(directory, is_main_process=rank == 0, state_dict=adapter_state_dict(model))`.

    Args:
        model: `ferrolora.PeftModel` (all its adapters), or another with adapters (its trainable parameters); sharded
            or not. Not a wrapper: use `accelerator.unwrap_model`.

    Returns:
        Tensors on the CPU, not shared with the model. The base is not gathered.

    Raises:
        UnsupportedError: an adapter with virtual tokens, whose file is not its parameters.
    """
    if isinstance(model, PeftModel):
        prompts = [name for name, config in model.peft_config.items() if config.is_prompt_learning]
        if prompts:
            raise UnsupportedError(
                f"adapter {prompts[0]!r} has virtual tokens; these are not gathered. Train it by DDP"
            )
        names = adapter_places(model)
    else:
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors = tensors_by_name(model)
    return {name: _whole(tensors[name]) for name in names}


def _blocks(model: Any) -> list[nn.Module]:
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _whole(tensor: Any) -> Tensor:
    """A copy on the CPU."""
    if hasattr(tensor, "full_tensor"):  # DTensor
        tensor = tensor.full_tensor()
    elif hasattr(tensor, "ds_id"):  # a parameter under ZeRO-3
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return torch.clone(tensor.detach()).cpu()
    return torch.clone(tensor.detach()).cpu()
