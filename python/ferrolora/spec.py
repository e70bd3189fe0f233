"""How a weight is quantized: the value that names a codec."""

from dataclasses import dataclass

from ferrolora.errors import UnsupportedError

QUANT_TYPES = ("nf4", "fp4", "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256


@dataclass(frozen=True)
class QuantSpec:
    """The codec of a quantized weight.

    Args:
        quant_type: "nf4" (4-bit NormalFloat), "fp4" (4-bit float) or "int8" (row-wise absmax). Default "nf4".
        block_size: values that share one scale, over the flattened weight: 32, 64, …, 4096. Default 64.
            int8 has one scale a row and does not use it (stays 64).
        double_quant: store the float32 scales as 8-bit codes too (4.127 instead of 4.5 bits a parameter).
            Default True; always False for int8.

    Raises:
        UnsupportedError: an unknown quant_type or block_size; the message lists the valid ones.

    Source: QLoRA, arXiv 2305.14314, sections 3 and 4.
    """

    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True

    def __post_init__(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise UnsupportedError(f"quant_type {self.quant_type!r} is unknown; choose one of {', '.join(QUANT_TYPES)}")
        if isinstance(self.block_size, bool) or self.block_size not in BLOCK_SIZES:
            valid = ", ".join(map(str, BLOCK_SIZES))
            raise UnsupportedError(f"block_size {self.block_size!r} is unknown; choose one of {valid}")
        if not isinstance(self.double_quant, bool):
            raise UnsupportedError(f"double_quant must be True or False, not {self.double_quant!r}")
        if self.quant_type == "int8":  # one int8 codec: specs that differ in what it ignores compare equal
            object.__setattr__(self, "block_size", 64)
            object.__setattr__(self, "double_quant", False)

    @property
    def is_4bit(self) -> bool:
        """Whether two codes share a byte (nf4, fp4)."""
        return self.quant_type != "int8"

    def block_count(self, numel: int) -> int:
        """How many scales a 4-bit tensor of `numel` values has: ceil(numel / block_size)."""
        return -(-numel // self.block_size)
