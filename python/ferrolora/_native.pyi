"""The compiled kernels. Tensors are contiguous CPU tensors; outputs are passed in; `threads` never changes a result.

What begins with `cuda` plans and launches the kernels of a GPU; only `CudaLaunch` takes tensors, of its device.
"""

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

__all__ = [
    "CudaLaunch",
    "available_isas",
    "codebook",
    "cuda_architectures",
    "cuda_driver",
    "cuda_fused_rows",
    "cuda_kernels",
    "cuda_launch",
    "cuda_plan",
    "cuda_source",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_int8",
    "double_quantize",
    "dropout_mask",
    "isa",
    "linear",
    "linear_backward",
    "linear_group",
    "linear_group_backward",
    "linear_lora",
    "linear_lora_backward",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_int8",
    "version",
]

def isa() -> str: ...
def available_isas() -> list[str]: ...
def version() -> str: ...
def codebook(name: str) -> list[float]: ...
def quantize_4bit(
    x: Tensor,
    quant_type: str,
    block_size: int,
    codes: Tensor,
    absmax: Tensor,
    threads: int,
    name: str | None = None,
) -> None: ...
def double_quantize(absmax: Tensor, codes: Tensor, nested_absmax: Tensor, threads: int) -> float: ...
def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: float,
    quant_type: str,
    block_size: int,
    out: Tensor,
    threads: int,
) -> None: ...
def quantize_int8(x: Tensor, codes: Tensor, scb: Tensor, threads: int, name: str | None = None) -> None: ...
def dequantize_int8(codes: Tensor, scb: Tensor, out: Tensor, threads: int) -> None: ...
def quantize_blockwise(
    x: Tensor,
    block_size: int,
    codes: Tensor,
    absmax: Tensor,
    threads: int,
    name: str | None = None,
) -> None: ...
def dequantize_blockwise(codes: Tensor, absmax: Tensor, block_size: int, out: Tensor, threads: int) -> None: ...
def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: float,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    bias: Tensor | None,
    y: Tensor,
    threads: int,
) -> None: ...
def linear_lora(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: float,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: int,
    row_ranks: list[tuple[int, int]],
    y: Tensor,
    s: Tensor,
    threads: int,
) -> None: ...
def linear_backward(
    dy: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: float,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    dx: Tensor,
    threads: int,
) -> None: ...
def linear_lora_backward(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: float,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float,
    seed: int,
    row_ranks: list[tuple[int, int]],
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
    threads: int,
) -> None: ...
def linear_group(
    x: Tensor, shape: tuple[int, int], members: list[Any], y: list[Tensor], s: list[Tensor], threads: int
) -> None: ...
def linear_group_backward(
    dy: list[Tensor],
    x: Tensor | None,
    s: list[Tensor],
    shape: tuple[int, int],
    members: list[Any],
    dx: Tensor | None,
    da: list[Tensor] | None,
    db: list[Tensor] | None,
    threads: int,
) -> None: ...
def dropout_mask(seed: int, rows: int, cols: int, p: float, out: Tensor) -> None: ...
def cuda_kernels() -> list[dict[str, Any]]: ...
def cuda_architectures() -> list[int]: ...
def cuda_source(file: str) -> str: ...
def cuda_fused_rows(sm: int) -> int: ...
def cuda_plan(problem: Mapping[str, Any], sm: int, sm_count: int | None = None) -> dict[str, Any] | None: ...
def cuda_driver() -> dict[str, Any]: ...
def cuda_launch(problem: Mapping[str, Any], index: int) -> CudaLaunch | None: ...

@final
class CudaLaunch:
    @property
    def sm(self) -> int: ...
    @property
    def entry(self) -> str: ...
    @property
    def file(self) -> str: ...
    @property
    def constants(self) -> dict[str, str]: ...
    @property
    def scratch_bytes(self) -> int: ...
    @property
    def counters(self) -> int: ...
    @property
    def is_loaded(self) -> bool: ...
    def load(self, cubin: bytes) -> None: ...
    def __call__(
        self, stream: int, scratch: Tensor | None, counters: Tensor | None, given: dict[str, Tensor | float | None]
    ) -> None: ...
