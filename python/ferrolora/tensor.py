"""A quantized tensor: packed codes, their scales, and what they stand for."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ferrolora.errors import ShapeError
from ferrolora.spec import NESTED_BLOCK_SIZE, QuantSpec


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A weight in 4 or 8 bits: nf4 and fp4 decode to `table[code] * absmax`, int8 to `code * absmax / 127`.

    Args:
        codes: nf4, fp4: uint8 `[(numel + 1) // 2, 1]`, the high nibble first. int8: int8 `[rows, columns]`.
        absmax: one scale a block (4-bit) or a row (int8): float32 `[blocks]`, or uint8 with double quantization.
        nested_absmax: float32 `[ceil(blocks / 256)]`, the scales of the scales; None without double quantization.
        offset: the mean that double quantization took off the scales, float32 scalar; None without.
        spec: the codec.
        shape: the shape of the float tensor.
        dtype: the float type of the tensor before quantization, which `dequantize()` gives back by default.

    Raises:
        ShapeError: the codes or the scales do not have the length or type that spec and shape call for.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    spec: QuantSpec
    shape: torch.Size
    dtype: torch.dtype

    def __post_init__(self) -> None:
        parts = expected_parts(self.spec, self.shape)
        for name, expected in parts.items():
            tensor: Tensor | None = getattr(self, name)
            seen = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
            if seen != expected:
                raise ShapeError(
                    f"{name} of a {self.spec.quant_type} tensor of shape {tuple(self.shape)} "
                    f"(block_size {self.spec.block_size}, double_quant {self.spec.double_quant}) "
                    f"must be {_describe(expected)}, not {_describe(seen)}"
                )

    def numel(self) -> int:
        """The number of values (not of bytes)."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and offset."""
        parts = (self.codes, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def to(self, device: torch.device | str) -> "QuantTensor":
        """The same tensor on another device; the scales keep their type."""
        nested = None if self.nested_absmax is None else self.nested_absmax.to(device)
        offset = None if self.offset is None else self.offset.to(device)
        absmax = self.absmax.to(device)
        return replace(self, codes=self.codes.to(device), absmax=absmax, nested_absmax=nested, offset=offset)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The float values, shape `self.shape`.

        Args:
            dtype: float32, float16 or bfloat16; None (default) gives `self.dtype`.

        Returns:
            A new tensor of shape `self.shape`: each value decoded in float32 and rounded once to dtype.

        Raises:
            UnsupportedError: another dtype, or a device without a kernel.
        """
        dtype = self.dtype if dtype is None else dtype
        if self.spec.is_4bit:
            args: tuple[Any, ...] = (self.absmax, self.nested_absmax, self.offset, *self.codec, list(self.shape), dtype)
            out: Tensor = torch.ops.ferrolora.dequantize_4bit(self.codes, *args)
            return out
        out = torch.ops.ferrolora.dequantize_int8(self.codes, self.absmax, dtype)
        return out.reshape(self.shape)

    @property
    def codec(self) -> tuple[str, int]:
        """(quant_type, block_size) as the operators take them."""
        return self.spec.quant_type, self.spec.block_size


Part = tuple[torch.dtype, tuple[int, ...]]


def expected_parts(spec: QuantSpec, shape: tuple[int, ...] | torch.Size) -> dict[str, Part | None]:
    """The (dtype, shape) of codes, absmax, nested_absmax and offset for a float tensor of `shape` under `spec`.

    None stands for a part that the codec does not have.
    """
    numel = math.prod(shape)
    if not spec.is_4bit:
        columns = shape[-1] if shape else 1
        rows = math.prod(shape[:-1])
        codes = (torch.int8, (rows, columns))
        return {"codes": codes, "absmax": (torch.float32, (rows,)), "nested_absmax": None, "offset": None}
    blocks = spec.block_count(numel)
    double = spec.double_quant
    return {
        "codes": (torch.uint8, ((numel + 1) // 2, 1)),
        "absmax": (torch.uint8 if double else torch.float32, (blocks,)),
        "nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),)) if double else None,
        "offset": (torch.float32, ()) if double else None,
    }


def _describe(part: Part | None) -> str:
    return "None" if part is None else f"{part[0]} {list(part[1])}"
