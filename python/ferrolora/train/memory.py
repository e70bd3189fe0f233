"""What the base weights of a model take, before and after quantization, and the peak of the process."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

from torch import nn

from ferrolora.nn import QuantExperts, QuantLinear
from ferrolora.nn.expert_stack import QuantStack
from ferrolora.tensor import QuantTensor


@dataclass(frozen=True)
class BaseMemory:
    """Bytes of a model's weights.

    Attributes:
        before: every parameter and buffer, the quantized weights counted in the float type they came from.
        after: every parameter and buffer as it is held now.
        linear_before: the quantized weights alone, in the float type they came from.
        linear_after: the quantized weights alone, codes and scales.
        linear_parameters: how many weights were quantized.
    """

    before: int
    after: int
    linear_before: int
    linear_after: int
    linear_parameters: int

    @property
    def bits_per_parameter(self) -> float:
        """Bits that one quantized weight takes, scales included; 0.0 if none was quantized."""
        return 8.0 * self.linear_after / self.linear_parameters if self.linear_parameters else 0.0

    def to_dict(self) -> dict[str, float]:
        """The figures for a JSON file."""
        return {**asdict(self), "bits_per_parameter": self.bits_per_parameter}


def base_memory(model: nn.Module) -> BaseMemory:
    """Count the bytes of `model`'s weights; call it before adapters are added. Shared tensors count once."""
    before = after = linear_before = linear_after = linear_parameters = 0
    seen: set[int] = set()
    for module in model.modules():
        own = {id(t): t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
        fresh = [tensor for key, tensor in own.items() if key not in seen]
        seen.update(own)
        held = sum(tensor.nbytes for tensor in fresh)
        after += held
        before += held
        for packed in _packed(module) if fresh else ():
            as_float = packed.numel() * packed.dtype.itemsize
            before += as_float - packed.nbytes
            linear_before += as_float
            linear_after += packed.nbytes
            linear_parameters += packed.numel()
    return BaseMemory(before, after, linear_before, linear_after, linear_parameters)


def _packed(module: nn.Module) -> list[QuantTensor | QuantStack]:
    if isinstance(module, QuantLinear):
        return [module.quant_tensor()]
    return [module.stack(name) for name in module.shapes] if isinstance(module, QuantExperts) else []


def peak_resident_bytes() -> int | None:
    """The most memory this process has held so far, in bytes; None where the system does not tell (Windows)."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
