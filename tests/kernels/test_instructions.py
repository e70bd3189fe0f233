"""Each wrapper of ptx.cuh does in the emulator what the PTX manual says, written here once more, element by element."""

import functools

import pytest
import torch
from torch import Tensor

from kernels.emulator import ROOT, Kernel, Out

ONE = (1, 1, 1)


@functools.cache
def kernel(entry: str) -> Kernel:
    source = (ROOT / "tests/kernels/instructions.cu").read_text()
    return Kernel("instructions.cu", entry, {}, source)


def words(*shape: int, seed: int = 0) -> Tensor:
    """Random 32-bit words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def unsigned(tensor: Tensor) -> list[int]:
    return [int(v) & 0xFFFFFFFF for v in tensor.flatten()]


def test_prmt_picks_bytes_and_spreads_signs() -> None:
    low, high, selector = words(32, seed=1), words(32, seed=2), words(32, seed=3)
    out = torch.zeros(32, dtype=torch.int32)
    kernel("test_prmt")(ONE, 32, low, high, selector, Out(out))
    for a, b, s, seen in zip(*map(unsigned, (low, high, selector, out)), strict=True):
        source = (a | b << 32).to_bytes(8, "little")
        expected = []
        for i in range(4):
            nibble = s >> (4 * i) & 15
            byte = source[nibble & 7]
            expected.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
        assert seen.to_bytes(4, "little") == bytes(expected)


def test_mul_hi_is_the_high_word_of_the_product() -> None:
    x, y = words(32, seed=4), words(32, seed=5)
    out = torch.zeros(32, dtype=torch.int32)
    kernel("test_mul_hi")(ONE, 32, x, y, Out(out))
    assert unsigned(out) == [a * b >> 32 for a, b in zip(unsigned(x), unsigned(y), strict=True)]


@pytest.mark.parametrize("mask", [1, 5, 31])
def test_shuffle_xor_gives_the_value_of_the_lane_across(mask: int) -> None:
    values = words(32)
    out = torch.zeros(32, dtype=torch.int32)
    kernel("test_shuffle_xor")(ONE, 32, values, Out(out), mask)
    assert out.tolist() == [values[lane ^ mask].item() for lane in range(32)]


def test_ballot_has_a_bit_for_each_lane() -> None:
    votes = words(32) % 2
    out = torch.zeros(32, dtype=torch.int32)
    kernel("test_ballot")(ONE, 32, votes, Out(out))
    expected = sum(1 << lane for lane in range(32) if votes[lane])
    assert unsigned(out) == [expected] * 32


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_deals_out_pairs_of_a_row_or_of_a_column(transposed: bool) -> None:
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(32, 4, dtype=torch.int32)
    kernel("test_ldmatrix")(ONE, 32, matrices, Out(out), int(transposed))
    halves = out.view(torch.int16).view(32, 4, 2)
    for lane in range(32):
        for i in range(4):
            for j in range(2):
                row, column = lane // 4, lane % 4 * 2 + j
                at = (column, row) if transposed else (row, column)
                assert halves[lane, i, j] == matrices[i][at]


def fragment(matrix: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """The 16-bit elements that one lane holds, as words."""
    return torch.stack([matrix[place] for place in places]).view(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mma_m16n8k16_multiplies_matrices_dealt_out_as_the_manual_says(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    # Small integers: every product and sum is exact, in any order.
    a = torch.randint(-8, 9, (16, 16), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (16, 8), generator=generator).to(dtype)
    c = torch.randint(-8, 9, (16, 8), generator=generator).float()
    left, right, sums = [], [], []
    for lane in range(32):
        g, t = lane // 4, lane % 4
        left.append(
            fragment(a, [(g + 8 * (i // 2 % 2), t * 2 + i % 2 + 8 * (i // 4)) for i in range(8)])
        )  # a0, a1: row g; a2, a3: row g + 8; a4 … a7: the same rows, columns 8 further
        right.append(fragment(b, [(t * 2 + i % 2 + 8 * (i // 2), g) for i in range(4)]))
        sums.append(torch.stack([c[g + 8 * (i // 2), t * 2 + i % 2] for i in range(4)]))
    out = torch.stack(sums)
    kernel("test_mma_m16n8k16")(ONE, 32, torch.stack(left), torch.stack(right), Out(out), int(dtype == torch.float16))
    expected = a.float() @ b.float() + c
    for lane in range(32):
        for i in range(4):
            assert out[lane, i] == expected[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]


def test_mma_m16n8k8_multiplies_matrices_dealt_out_as_the_manual_says() -> None:
    generator = torch.Generator().manual_seed(7)
    a = torch.randint(-8, 9, (16, 8), generator=generator).half()
    b = torch.randint(-8, 9, (8, 8), generator=generator).half()
    left, right = [], []
    for lane in range(32):
        g, t = lane // 4, lane % 4
        left.append(fragment(a, [(g + 8 * (i // 2), t * 2 + i % 2) for i in range(4)]))
        right.append(fragment(b, [(t * 2 + i, g) for i in range(2)]))
    out = torch.ones(32, 4)
    kernel("test_mma_m16n8k8")(ONE, 32, torch.stack(left), torch.stack(right), Out(out))
    expected = a.float() @ b.float() + 1
    for lane in range(32):
        for i in range(4):
            assert out[lane, i] == expected[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]


def test_cp_async_copies_sixteen_bytes_or_zeros() -> None:
    values = words(2, 32, 4)
    out = torch.full((2, 32, 4), -1, dtype=torch.int32)
    kernel("test_cp_async")(ONE, 32, values, Out(out))
    values[:, 1::2] = 0
    assert torch.equal(out, values)


def test_conversions_round_to_nearest_even_as_torch_does() -> None:
    # Every exponent, ties and their neighbours, subnormal results, overflow, signs; and random bits.
    exponents = torch.arange(256, dtype=torch.int64).repeat_interleave(32) << 23
    fractions = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2FFF, 0x3000, 0x7FFFFF, 0x7FF000, 0x7FE000])
    edges = (exponents + fractions.repeat(3)[:32].repeat(256)).to(torch.int32)
    x = torch.cat([edges, edges | -(2**31), words(4096)]).view(torch.float32)
    half, bfloat = torch.zeros(x.numel(), dtype=torch.float16), torch.zeros(x.numel(), dtype=torch.bfloat16)
    back, integer = torch.zeros(x.numel()), torch.zeros(x.numel(), dtype=torch.int32)
    pair = torch.zeros(x.numel(), 2, dtype=torch.int32)
    grid = (x.numel() // 32, 1, 1)
    kernel("test_convert")(grid, 32, x, Out(half), Out(bfloat), Out(pair), Out(back), Out(integer))
    assert torch.equal(half.nan_to_num(7.0), x.half().nan_to_num(7.0))
    assert torch.equal(bfloat.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
    assert torch.equal(back.nan_to_num(7.0), x.half().float().nan_to_num(7.0))
    for column, single in ((0, half), (1, bfloat)):
        both = torch.stack([single, torch.full_like(single, 2.0)], 1)
        assert torch.equal(pair[:, column].contiguous().view(torch.int16), both.view(torch.int16).flatten())
    inside = x.abs() < 1e6
    assert torch.equal(integer[inside].float(), x[inside].round())
