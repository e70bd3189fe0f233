"""What every operator asks of its inputs before a kernel runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ferrolora.errors import ShapeError, UnsupportedError

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def require_float(op: str, what: str, dtype: torch.dtype) -> None:
    """Raise UnsupportedError unless dtype is one that the kernels compute in."""
    if dtype not in FLOAT_TYPES:
        raise UnsupportedError(f"{op}: {what} is {dtype}; the kernels take float32, float16 and bfloat16")


def require_device(op: str, x: Tensor, codec: tuple[str, int], **others: Tensor | None) -> None:
    """Raise UnsupportedError, naming the whole problem, unless all tensors are on the CPU or all on one GPU."""
    index = x.get_device()  # of the GPU; the CPU's and meta's are below 0
    for what, tensor in (("input", x), *others.items()):
        if tensor is None or (tensor.is_cuda and tensor.get_device() == index) or (tensor.is_cpu and x.is_cpu):
            continue
        problem = f"input {list(x.shape)} {x.dtype}, quant_type {codec[0]}, block_size {codec[1]}"
        if x.is_cuda or tensor.is_cuda:
            raise UnsupportedError(
                f"{op}: the {what} is on {tensor.device} and the input on {x.device} ({problem}); use one device"
            )
        raise UnsupportedError(f"{op}: no kernel for the {what} on {tensor.device} ({problem}); move it to cpu or cuda")


def require_linear(op: str, x: Tensor, n: int, k: int, bias: Tensor | None) -> None:
    """Raise ShapeError or UnsupportedError unless x is float [..., k] and bias float [n] or None."""
    require_float(op, "x", x.dtype)
    if x.dim() == 0 or x.shape[-1] != k:
        raise ShapeError(f"{op}: x must be [..., {k}] for a weight [{n}, {k}], not {list(x.shape)}")
    if bias is not None:
        require_float(op, "bias", bias.dtype)
        if tuple(bias.shape) != (n,):
            raise ShapeError(f"{op}: bias must be [{n}], not {list(bias.shape)}")


def require_low_rank(op: str, n: int, k: int, lora_a: Tensor, lora_b: Tensor) -> None:
    """Raise ShapeError or UnsupportedError unless A is [r, k] and B [n, r], of one float type, r at least 1."""
    rank = lora_a.shape[0] if lora_a.dim() == 2 else 0
    if rank == 0 or tuple(lora_a.shape) != (rank, k) or tuple(lora_b.shape) != (n, rank):
        raise ShapeError(
            f"{op}: A must be [r, {k}] and B [{n}, r] with r of at least 1, "
            f"not {list(lora_a.shape)} and {list(lora_b.shape)}"
        )
    require_float(op, "A", lora_a.dtype)
    if lora_b.dtype != lora_a.dtype:
        raise UnsupportedError(f"{op}: A and B must have one type, not {lora_a.dtype} and {lora_b.dtype}")


def require_row_ranks(x: Tensor, row_ranks: Sequence[int], rank: int) -> None:
    """Raise ShapeError unless there are as many pairs (start, end), within the rank, as divide the rows of x."""
    count = len(row_ranks) // 2
    rows = x[..., 0].numel() if x.shape[-1] else 0
    within = all(0 <= start <= end <= rank for start, end in zip(row_ranks[::2], row_ranks[1::2], strict=False))
    if len(row_ranks) % 2 or not within or (count and rows % count):
        raise ShapeError(
            f"linear_lora: row_ranks must be pairs (start, end) within the rank {rank}, as many as divide the {rows} "
            f"rows of x, not {list(row_ranks)}"
        )
