"""quantize: a float weight to NF4 with double quantization, against bitsandbytes' `quantize_4bit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ferrolora import _native
from ferrolora.bench.contender import BITSANDBYTES, COPY, FRESH, OURS, REUSED, Case, Contender
from ferrolora.bench.inputs import SPEC, float_weight
from ferrolora.bench.problem import Problem
from ferrolora.bench.verdict import Verdict, first_wrong, same
from ferrolora.ops import reference
from ferrolora.ops.quantize import quantize
from ferrolora.spec import NESTED_BLOCK_SIZE

CODEC = (SPEC.quant_type, SPEC.block_size)
SLAB = 2**22  # values that the twin quantizes at a time: it holds 15 comparisons of each
Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # codes, absmax codes, their scales, their offset


def case(problem: Problem, peers: frozenset[str]) -> Case:
    """Ours with a fresh and a reused output, bitsandbytes, and a copy of the float weight as the ceiling."""
    w = float_weight(problem)
    codes, absmax = _expected(w)
    moved = problem.weight_bytes + problem.packed_bytes

    def ours(parts: Parts) -> Verdict:
        nested = reference.double_quantize(absmax)
        expected = (codes, nested[0], nested[1], torch.tensor(nested[2]))
        names = ("codes", "absmax", "nested_absmax", "offset")
        return first_wrong(*(same(*trio) for trio in zip(names, parts, expected, strict=True)))

    def judge_peer(result: Any) -> Verdict:
        return _judge_bitsandbytes(result, codes, absmax)

    contenders = [
        Contender(OURS, lambda: _reused(w, codes, absmax), ours, moved, output=REUSED),
        Contender(OURS, lambda: lambda: _parts(w), ours, moved, output=FRESH),
    ]
    if BITSANDBYTES in peers:
        contenders.append(Contender(BITSANDBYTES, lambda: _bitsandbytes(w), judge_peer, moved))
    target = torch.empty_like(w)
    copied = Contender(
        COPY, lambda: lambda: target.copy_(w), lambda found: same("copy", found, w), 2 * w.nbytes, output=REUSED
    )
    return Case("quantize", problem, (*contenders, copied), COPY)


def _expected(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales by the reference twin, in slabs of whole blocks."""
    slabs = [reference.quantize_4bit(slab, *CODEC) for slab in torch.split(w.reshape(-1), SLAB)]
    return torch.cat([codes for codes, _ in slabs]), torch.cat([absmax for _, absmax in slabs])


def _parts(w: Tensor) -> Parts:
    qt = quantize(w, SPEC)
    assert qt.nested_absmax is not None
    assert qt.offset is not None
    return qt.codes, qt.absmax, qt.nested_absmax, qt.offset


def _reused(w: Tensor, codes: Tensor, absmax: Tensor) -> Callable[[], Parts]:
    """The native functions over tensors that are kept: the public `quantize` always makes its own."""
    # Not empty: what lies in fresh memory may be the result of another.
    out = torch.zeros_like(codes), torch.zeros_like(absmax)
    nested_codes = torch.zeros(absmax.shape, dtype=torch.uint8)
    nested_absmax = torch.zeros(-(-absmax.numel() // NESTED_BLOCK_SIZE))

    def run() -> Parts:
        threads = torch.get_num_threads()
        _native.quantize_4bit(w, *CODEC, *out, threads)
        offset = _native.double_quantize(out[1], nested_codes, nested_absmax, threads)
        return out[0], nested_codes, nested_absmax, torch.tensor(offset)

    return run


def _bitsandbytes(w: Tensor) -> Callable[[], Any]:
    from bitsandbytes.functional import quantize_4bit

    return lambda: quantize_4bit(w, blocksize=SPEC.block_size, compress_statistics=True, quant_type=SPEC.quant_type)


def _judge_bitsandbytes(result: Any, codes: Tensor, absmax: Tensor) -> Verdict:
    """The codes are equal, and the scales within what 8 bits can hold.

    Its mean and its choice of 8-bit code depart from ours in the last place: a code is right if it lies as near as half
    the widest gap of the table, plus half a step of the 65,536 points to which it first rounds the value.
    """
    found, state = result
    table = reference.codebook("dynamic8").double()
    # Half a gap; beyond the lowest entry, which lies above -1, a whole one.
    reach = max(float(table.diff().max()) / 2, float(table[0]) + 1.0) + 2.0**-16
    nested = state.state2.absmax.double().repeat_interleave(NESTED_BLOCK_SIZE)[: absmax.numel()]
    decoded = table[state.absmax.long()] * nested + float(state.offset)
    rounding = 2.0**-22 * (absmax.double() + abs(float(state.offset)))  # four float32 operations on values this large
    outside = int(((decoded - absmax.double()).abs() > reach * nested + rounding).sum())
    scales = Verdict(outside == 0, f"absmax: {outside} of {absmax.numel()} scales outside the bound" if outside else "")
    return first_wrong(same("codes", found, codes), scales)
