"""Counts what a process hands to torch.distributed."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Within it every collective of this process is noted: bytes by kind and type, as ("allreduce", torch.float32).

    Bytes are those of the process's own contribution: what it gives to an all-reduce, to a reduce-scatter (all of it)
    or to an all-gather (its part).
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, torch.dtype]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func._opname.strip("_").removesuffix("_base").removesuffix("_coalesced").removesuffix("_into_tensor")
            given = args[1] if kind in ("allgather", "reduce_scatter") else args[0]
            for tensor in tree_leaves(given):
                if isinstance(tensor, torch.Tensor):
                    self.bytes[kind, tensor.dtype] += tensor.nbytes
        return func(*args, **(kwargs or {}))
