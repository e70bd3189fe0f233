"""linear: y = x·deq(W)ᵀ without gradients, against dense torch and bitsandbytes' Linear4bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ferrolora.bench import oracle
from ferrolora.bench.contender import BITSANDBYTES, OURS, TORCH, Case, Contender
from ferrolora.bench.inputs import activations, bitsandbytes_layer, weight
from ferrolora.bench.problem import Problem
from ferrolora.bench.verdict import Verdict, at_most_twice, first_wrong, within
from ferrolora.ops.linear import linear
from ferrolora.tensor import QuantTensor

SCALING_FROM = 16  # rows from which one thread is measured beside all


def case(problem: Problem, peers: frozenset[str]) -> Case:
    """Ours (from 16 rows on one thread too), bitsandbytes, and dense torch, which is the ceiling too."""
    packed, decoded, dense = weight(problem)
    x = activations(problem)
    expected = oracle.product(x, oracle.decoded_weight(decoded, x.dtype))
    moved = problem.activation_bytes + problem.packed_bytes

    def plain(y: Tensor) -> Verdict:
        return within("y", y, expected)

    def ours(y: Tensor) -> Verdict:
        verdict = plain(y)
        if x.dtype == torch.float32 or not verdict.right:
            return verdict
        rounded = (x.double() @ dense.double().T).to(x.dtype)
        return first_wrong(verdict, at_most_twice("y", y, rounded, expected.value))

    def bitsandbytes(y: Tensor) -> Verdict:
        verdict = plain(y)
        if verdict.right or x.dtype == torch.bfloat16:
            return verdict
        narrow = within("y", y, oracle.bfloat16_product(x, decoded))
        return narrow._replace(note="computed in bfloat16") if narrow.right else verdict

    def own(threads: int | None) -> Contender:
        return Contender(
            OURS, lambda: _without_gradients(lambda: linear(x, packed)), ours, moved, problem.flops, threads=threads
        )

    contenders = [own(None)]
    if problem.rows >= SCALING_FROM and torch.get_num_threads() > 1:
        contenders.append(own(1))
    if BITSANDBYTES in peers:
        contenders.append(Contender(BITSANDBYTES, lambda: _bitsandbytes(x, packed), bitsandbytes, moved, problem.flops))
    dense_bytes = problem.activation_bytes + problem.weight_bytes
    contenders.append(
        Contender(TORCH, lambda: _without_gradients(lambda: F.linear(x, dense)), plain, dense_bytes, problem.flops)
    )
    return Case("linear", problem, tuple(contenders), TORCH)


def _bitsandbytes(x: Tensor, packed: QuantTensor) -> Callable[[], Tensor]:
    layer = bitsandbytes_layer(packed, x.dtype).eval()
    return _without_gradients(lambda: layer(x))


def _without_gradients(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return call()

    return run
