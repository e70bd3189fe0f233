"""The definition of bitsandbytes' codecs, in plain torch, float32, one line of arithmetic at a time.

bitsandbytes has several implementations that do not agree to the last bit. The definition is its CUDA kernels
(`csrc/kernels.cu`), to which this file is a slow twin; `tests/golden/README.md` lists where its CPU code departs.
It imports neither ferrolora nor bitsandbytes, so both can be held to it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
# Below this a block's reciprocal would overflow; bitsandbytes clamps it here.
SMALLEST_SCALE = 1e-38

NF4_BITS = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # divided by 12; index = low three bits of the code
# Literals of dQuantizeFP4, each with the code of the magnitudes just above it.
FP4_STEPS = (
    (0.00260417, 0b001),
    (0.0859375, 0b110),
    (0.20833333, 0b111),
    (0.29166667, 0b100),
    (0.4166667, 0b101),
    (0.583333, 0b010),
    (0.8333333, 0b011),
)


class Nested(NamedTuple):
    """Double-quantized scales: `absmax[i] = map[codes[i]] * absmax[i // 256] + offset`."""

    codes: Tensor  # uint8 [nblocks]
    absmax: Tensor  # float32 [ceil(nblocks / 256)]
    offset: Tensor  # float32 scalar


def table(quant_type: str) -> Tensor:
    """The 16 float32 values of a 4-bit type, indexed by code."""
    if quant_type == "nf4":
        return torch.tensor([struct.unpack(">f", bytes.fromhex(word))[0] for word in NF4_BITS.split()])
    magnitudes = torch.tensor(FP4_MAGNITUDES) / 12
    return torch.cat([magnitudes, -magnitudes])


def dynamic_map() -> Tensor:
    """The 256 sorted float32 values of the signed 8-bit dynamic map (7 exponent and 7 fraction levels)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10.0 ** (exponent - 6)) * means
        values += scaled.tolist()
        values += (-scaled).tolist()
    return torch.tensor(sorted(values))


def block_scale(flat: Tensor, block_size: int) -> Tensor:
    """Largest magnitude of each block of a flat float32 tensor; the last block may be short."""
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size))
    return padded.view(-1, block_size).abs().amax(dim=1)


def scaled_values(flat: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """`x * (1 / absmax)` for each element, the product that is compared with the thresholds."""
    inverse = 1.0 / absmax.clamp(min=SMALLEST_SCALE)
    return flat * inverse.repeat_interleave(block_size)[: flat.numel()]


def encode_nf4(scaled: Tensor) -> Tensor:
    """Number of float32 midpoints strictly below the value: a tie goes to the lower code."""
    values = table("nf4")
    return torch.bucketize(scaled, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def encode_fp4(scaled: Tensor) -> Tensor:
    """Sign bit, then the magnitude against the literals of dQuantizeFP4."""
    code = torch.zeros_like(scaled, dtype=torch.uint8)
    for threshold, above in FP4_STEPS:
        code = torch.where(scaled.abs() > threshold, torch.tensor(above, dtype=torch.uint8), code)
    return code + 8 * (scaled < 0).to(torch.uint8)


def encode(scaled: Tensor, quant_type: str) -> Tensor:
    """4-bit code of each scaled value."""
    return encode_nf4(scaled) if quant_type == "nf4" else encode_fp4(scaled)


def pack(codes: Tensor, quant_type: str) -> Tensor:
    """Two codes a byte, the first in the high nibble; an odd count is padded with the code of 0. uint8 [n, 1]."""
    if codes.numel() % 2:
        codes = torch.cat([codes, encode(torch.zeros(1), quant_type)])
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The inverse of `pack`."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 0xF], dim=1).flatten()[:numel]


def quantize_4bit(x: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [ceil(numel / 2), 1] and absmax float32 [ceil(numel / block_size)]."""
    flat = x.reshape(-1).float()
    absmax = block_scale(flat, block_size)
    return pack(encode(scaled_values(flat, absmax, block_size), quant_type), quant_type), absmax


def dequantize_4bit(packed: Tensor, absmax: Tensor, quant_type: str, block_size: int, numel: int) -> Tensor:
    """`table[code] * absmax` in float32."""
    values = table(quant_type)[unpack(packed, numel).long()]
    return values * absmax.repeat_interleave(block_size)[:numel]


def quantize_blockwise(x: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """8-bit dynamic codes: the nearest map value, a tie to the lower. uint8 [numel], float32 [nblocks].

    float64 holds the midpoint of two neighbours of the map exactly, so "nearest" is exact.
    """
    flat = x.reshape(-1).float()
    absmax = block_scale(flat, block_size)
    values = dynamic_map().double()
    codes = torch.bucketize(scaled_values(flat, absmax, block_size).double(), (values[:-1] + values[1:]) / 2)
    return codes.to(torch.uint8), absmax


def dequantize_blockwise(codes: Tensor, absmax: Tensor, block_size: int) -> Tensor:
    """`map[code] * absmax` in float32."""
    return dynamic_map()[codes.flatten().long()] * absmax.repeat_interleave(block_size)[: codes.numel()]


def mean_offset(absmax: Tensor) -> Tensor:
    """Mean of the scales, summed in float64 and rounded once: independent of vector width and threads."""
    return absmax.double().mean().float()


def double_quantize(absmax: Tensor, offset: Tensor | None = None) -> Nested:
    """Quantize the scales themselves, around their mean or around a given offset."""
    offset = mean_offset(absmax) if offset is None else offset
    codes, nested_absmax = quantize_blockwise(absmax - offset, NESTED_BLOCK)
    return Nested(codes, nested_absmax, offset)


def double_dequantize(nested: Nested) -> Tensor:
    """The scales a reader of the double-quantized form uses, float32."""
    return dequantize_blockwise(nested.codes, nested.absmax, NESTED_BLOCK) + nested.offset


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row-wise int8 [N, K] and the row maxima float32 [N]; a zero row gives zeros.

    `x * ((1 / scale) * 127)`, rounded half to even: torch computes 127 / scale so, and it differs from a division.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=1)
    factor = torch.where(scale > 0, scale.reciprocal() * 127.0, torch.zeros(()))
    return torch.round(wide * factor.unsqueeze(1)).to(torch.int8), scale


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """`(CB * SCB) * (1 / 127)` in float32, in this order: a division by 127 differs in the last bit."""
    return codes.float() * scale.unsqueeze(1) * (1.0 / 127.0)
