"""backward: y = x·deq(W)ᵀ and dX = dY·deq(W), against dense torch and bitsandbytes' Linear4bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ferrolora.bench import oracle
from ferrolora.bench.approximation import Approximation
from ferrolora.bench.contender import BITSANDBYTES, OURS, TORCH, Case, Contender
from ferrolora.bench.inputs import activations, bitsandbytes_layer, output_gradient, weight
from ferrolora.bench.problem import Problem
from ferrolora.bench.verdict import Verdict, first_wrong, within
from ferrolora.ops.linear import linear

Result = tuple[Tensor, Tensor]  # y, dX


def case(problem: Problem, peers: frozenset[str]) -> Case:
    """Ours, bitsandbytes, and dense torch, which is the ceiling too."""
    packed, decoded, dense = weight(problem)
    x, dy = activations(problem).requires_grad_(), output_gradient(problem)
    seen = oracle.decoded_weight(decoded, x.dtype)
    y, dx = oracle.product(x, seen), (Approximation.exact(dy) @ seen).rounded(x.dtype)

    def check(found: Result) -> Verdict:
        return first_wrong(within("y", found[0], y), within("dX", found[1], dx))

    def contender(library: str, prepare: Callable[[], Callable[[], Tensor]], weight_bytes: int) -> Contender:
        moved = 2 * (problem.activation_bytes + weight_bytes)
        return Contender(library, lambda: both_ways(prepare(), x, dy), check, moved, 2 * problem.flops)

    contenders = [contender(OURS, lambda: lambda: linear(x, packed), problem.packed_bytes)]
    if BITSANDBYTES in peers:
        contenders.append(contender(BITSANDBYTES, lambda: _bitsandbytes(packed, x), problem.packed_bytes))
    contenders.append(contender(TORCH, lambda: lambda: F.linear(x, dense), problem.weight_bytes))
    return Case("backward", problem, tuple(contenders), TORCH)


def both_ways(forward: Callable[[], Tensor], x: Tensor, dy: Tensor) -> Callable[[], Result]:
    """One forward and the gradient in x."""

    def run() -> Result:
        y = forward()
        (dx,) = torch.autograd.grad(y, x, dy)
        return y, dx

    return run


def _bitsandbytes(packed: Any, x: Tensor) -> Callable[[], Tensor]:
    layer = bitsandbytes_layer(packed, x.dtype).train()
    return lambda: layer(x)
