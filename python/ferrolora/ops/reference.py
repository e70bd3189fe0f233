"""The slow, readable twin of every native kernel, in plain torch. The tests hold the kernels to it.

It never runs in place of a kernel. Everything is float32 on flat blocks; nothing is fused or clever.
"""

import struct

import torch
from torch import Tensor
from torch.nn import functional as F

NF4_BITS = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by the low three bits, in twelfths
FP4_ORDER = (0, 1, 6, 7, 4, 5, 2, 3)  # codes by growing magnitude
FP4_THRESHOLDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)
NESTED_BLOCK = 256
SMALLEST_SCALE = 1e-38  # keeps 1/absmax finite


def codebook(name: str) -> Tensor:
    """The float32 values of a table by code: "nf4" and "fp4" `[16]`, "dynamic8" `[256]`."""
    if name == "nf4":
        return torch.tensor([struct.unpack(">f", bytes.fromhex(word))[0] for word in NF4_BITS.split()])
    if name == "fp4":
        positive = torch.tensor(FP4_MAGNITUDES) / 12.0
        return torch.cat([positive, -positive])
    return _dynamic_map()


def _dynamic_map() -> Tensor:
    """Seven decades of midpoints, 2^i of them in decade i, both signs, with 0 and 1: 256 values, sorted."""
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1)
        midpoints = (edges[:-1] + edges[1:]) / 2.0
        values += [10.0 ** (i - 6) * midpoints, -(10.0 ** (i - 6)) * midpoints]
    return torch.cat(values).sort().values


def _blocks(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """x as zero-padded float32 rows `[blocks, block_size]` and each row's largest magnitude."""
    flat = x.detach().reshape(-1).float()
    rows = F.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    return rows, rows.abs().amax(dim=1)


def _scaled(rows: Tensor, absmax: Tensor) -> Tensor:
    return rows * (1.0 / absmax.clamp_min(SMALLEST_SCALE)).unsqueeze(1)


def _count_below(x: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds lie strictly below each value of x: a tie goes to the lower code."""
    return (x.unsqueeze(-1) > thresholds).sum(-1)


def quantize_4bit(x: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 `[(numel + 1) // 2, 1]` and absmax float32 `[blocks]`."""
    rows, absmax = _blocks(x, block_size)
    scaled = _scaled(rows, absmax)
    if quant_type == "nf4":
        table = codebook("nf4")
        codes = _count_below(scaled, (table[:-1] + table[1:]) / 2.0)
    else:
        rank = _count_below(scaled.abs(), torch.tensor(FP4_THRESHOLDS))
        codes = torch.tensor(FP4_ORDER)[rank] + 8 * (scaled < 0.0)
    flat = codes.reshape(-1)[: x.numel()].to(torch.uint8)
    if x.numel() % 2:
        zero = 7 if quant_type == "nf4" else 0
        flat = torch.cat([flat, flat.new_tensor([zero])])
    return ((flat[0::2] << 4) | flat[1::2]).unsqueeze(1), absmax


def unpack(codes: Tensor, numel: int) -> Tensor:
    """One code a value, int64 `[numel]`."""
    flat = codes.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:numel].long()


def double_quantize(absmax: Tensor) -> tuple[Tensor, Tensor, float]:
    """8-bit codes uint8 `[blocks]`, their scales float32 `[ceil(blocks / 256)]`, and the mean taken off first.

    The mean is computed in float64 and rounded once: torch's float32 mean depends on threads and vector width.
    """
    offset = absmax.double().mean().float()
    codes, nested_absmax = quantize_blockwise(absmax - offset, NESTED_BLOCK)
    return codes, nested_absmax, float(offset)


def absmax_of(absmax: Tensor, nested_absmax: Tensor | None, offset: float) -> Tensor:
    """The float32 scales, whether they were quantized (nested_absmax given) or not."""
    if nested_absmax is None:
        return absmax
    return dequantize_blockwise(absmax, nested_absmax, NESTED_BLOCK) + torch.tensor(offset, dtype=torch.float32)


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: float,
    quant_type: str,
    block_size: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`table[code] * absmax(block)` in float32, rounded once to dtype."""
    numel = torch.Size(shape).numel()
    values = codebook(quant_type)[unpack(codes, numel)]
    scales = absmax_of(absmax, nested_absmax, offset).repeat_interleave(block_size)[:numel]
    return (values * scales).to(dtype).reshape(shape)


def quantize_blockwise(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """8-bit codes, the shape of x, of the exactly nearest dynamic-map value, ties to the lower; absmax `[blocks]`."""
    rows, absmax = _blocks(x, block_size)
    table = codebook("dynamic8").double()  # midpoints of float32 values are exact in float64
    midpoints = (table[:-1] + table[1:]) / 2.0
    codes = torch.bucketize(_scaled(rows, absmax).double(), midpoints)  # counts midpoints strictly below
    return codes.reshape(-1)[: x.numel()].to(torch.uint8).reshape(x.shape), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, block_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`dynamic_map[code] * absmax(block)` in float32, rounded once to dtype; the shape of codes."""
    values = codebook("dynamic8")[codes.reshape(-1).long()]
    scales = absmax.repeat_interleave(block_size)[: codes.numel()]
    return (values * scales).to(dtype).reshape(codes.shape)


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`round_half_even(x * (127 / absmax(row)))` int8 `[N, K]` and absmax float32 `[N]`; a zero row gives zeros.

    A row so small that 127 / absmax overflows is first multiplied by 2^64, which rounds nothing.
    """
    rows = x.detach().float()
    scb = rows.abs().amax(dim=1)
    lift = torch.where(torch.isinf(127.0 / scb), 2.0**64, 1.0)
    codes = torch.round(rows * lift.unsqueeze(1) * (127.0 / (scb * lift)).unsqueeze(1))
    return codes.nan_to_num(nan=0.0).to(torch.int8), scb


def dequantize_int8(codes: Tensor, scb: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`(code * absmax(row)) * (1 / 127)` in float32 in this order, rounded once to dtype."""
    return (codes.float() * scb.unsqueeze(1) * (1.0 / 127.0)).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x·Wᵀ + bias in the type of weight, for a decoded weight `[N, K]`."""
    y = x.to(weight.dtype) @ weight.T
    return y if bias is None else y + bias.to(weight.dtype)


def linear_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x·Wᵀ + bias + s·S·Bᵀ and S = (x⊙mask)·Aᵀ, in the type of weight; mask holds 0 or 1/(1-p), None no dropout."""
    a, b = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
    dropped = x.to(weight.dtype) if mask is None else x.to(weight.dtype) * mask.to(weight.dtype)
    s = dropped @ a.T
    return linear(x, weight, bias) + scaling * (s @ b.T), s


def linear_backward(dy: Tensor, weight: Tensor) -> Tensor:
    """dX = dY·W in the type of weight."""
    return dy.to(weight.dtype) @ weight


def linear_lora_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX = dY·W + (dS·A)⊙mask, dA = dSᵀ·(x⊙mask), dB = s·dYᵀ·S with dS = s·dY·B; x `[M, K]`, in weight's type."""
    kept = torch.ones_like(x, dtype=weight.dtype) if mask is None else mask.to(weight.dtype)
    dy, a, b = dy.to(weight.dtype), lora_a.to(weight.dtype), lora_b.to(weight.dtype)
    ds = scaling * (dy @ b)
    dx = dy @ weight + (ds @ a) * kept
    return dx, ds.T @ (x.to(weight.dtype) * kept), scaling * (dy.T @ s.to(weight.dtype))
