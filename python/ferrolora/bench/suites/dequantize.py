"""dequantize: NF4 with double quantization back to floats, against bitsandbytes and the speed of memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ferrolora.bench.approximation import UNIT_ROUNDOFF, Approximation
from ferrolora.bench.contender import BITSANDBYTES, COPY, FRESH, OURS, REUSED, Case, Contender
from ferrolora.bench.inputs import bitsandbytes_layer, weight
from ferrolora.bench.problem import Problem
from ferrolora.bench.verdict import Verdict, same, within
from ferrolora.ops.dequantize import dequantize
from ferrolora.tensor import QuantTensor


def case(problem: Problem, peers: frozenset[str]) -> Case:
    """Ours with a fresh and a reused output, bitsandbytes, and a copy of the output as the ceiling."""
    packed, decoded, dense = weight(problem)
    dtype = problem.torch_dtype
    moved = problem.weight_bytes + problem.packed_bytes

    def exact(found: Tensor) -> Verdict:
        return same("values", found, dense)

    # Not empty: what lies in fresh memory may be the result of another.
    out, target = torch.full_like(dense, torch.nan), torch.full_like(dense, torch.nan)
    contenders = [
        Contender(OURS, lambda: lambda: dequantize(packed, out=out), exact, moved, output=REUSED),
        Contender(OURS, lambda: lambda: dequantize(packed, dtype), exact, moved, output=FRESH),
    ]
    if BITSANDBYTES in peers:
        near = partial(within, "values", expected=_rounded_elsewhere(packed, decoded).rounded(dtype))
        contenders.append(Contender(BITSANDBYTES, lambda: _bitsandbytes(packed, dtype), near, moved))
    contenders += [
        Contender(COPY, lambda: lambda: target.copy_(dense), exact, 2 * dense.nbytes, output=REUSED),
        Contender(COPY, lambda: dense.clone, exact, 2 * dense.nbytes, output=FRESH),
    ]
    return Case("dequantize", problem, tuple(contenders), COPY)


def _rounded_elsewhere(packed: QuantTensor, decoded: Tensor) -> Approximation:
    """table·(code·nested + offset) with its three float32 roundings in other places than in the definition.

    The product code·nested may be larger than the scale it ends in, and its rounding goes by its own size.
    """
    assert packed.nested_absmax is not None
    assert packed.offset is not None
    bound = Approximation.exact(decoded).rounded(torch.float32).rounded(torch.float32)
    largest = float(packed.nested_absmax.max() + packed.offset.abs())
    return Approximation(bound.value, bound.error + UNIT_ROUNDOFF[torch.float32] * largest)


def _bitsandbytes(packed: QuantTensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    from bitsandbytes.functional import dequantize_4bit

    layer = bitsandbytes_layer(packed, dtype)
    data, state = layer.weight.data, layer.weight.quant_state
    state.dtype = dtype
    return lambda: dequantize_4bit(data, state)
