"""lora: forward and backward with a rank-16 branch, against PEFT + bitsandbytes, and dense torch without a branch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ferrolora.bench import lora_memory, oracle
from ferrolora.bench.approximation import Approximation
from ferrolora.bench.contender import OURS, PEFT, TORCH, Case, Contender
from ferrolora.bench.inputs import activations, low_rank, output_gradient, weight
from ferrolora.bench.lora_step import STEPS
from ferrolora.bench.problem import RANK, Problem
from ferrolora.bench.verdict import Verdict, first_wrong, within

NAMES = ("y", "dX", "dA", "dB")


def case(problem: Problem, peers: frozenset[str]) -> Case:
    """Ours, PEFT over bitsandbytes, and dense torch without the branch, which is the ceiling too."""
    x, dy = activations(problem), output_gradient(problem)
    decoded = weight(problem).decoded
    seen = oracle.decoded_weight(decoded, x.dtype)
    expected = oracle.low_rank_layer(x, seen, *low_rank(problem), dy)
    plain = oracle.product(x, seen), (Approximation.exact(dy) @ seen).rounded(x.dtype)

    def check(found: tuple[Tensor, ...]) -> Verdict:
        return first_wrong(*(within(*trio) for trio in zip(NAMES, found, expected, strict=True)))

    def check_dense(found: tuple[Tensor, ...]) -> Verdict:
        return first_wrong(*(within(*trio) for trio in zip(NAMES, found, plain, strict=False)))

    # x·Aᵀ, S·Bᵀ, dY·B, dS·A, dSᵀ·x and dYᵀ·S.
    branch = 6 * problem.rows * RANK * (problem.n + problem.k)

    def contender(
        library: str, judge: Callable[[tuple[Tensor, ...]], Verdict], weight_bytes: int, flops: int
    ) -> Contender:
        return Contender(
            library,
            lambda: STEPS[library](problem),
            judge,
            2 * (problem.activation_bytes + weight_bytes),
            flops,
            peak_bytes=lambda: lora_memory.peak_bytes(library, problem),
        )

    contenders = [contender(OURS, check, problem.packed_bytes, 2 * problem.flops + branch)]
    if PEFT in peers:
        contenders.append(contender(PEFT, check, problem.packed_bytes, 2 * problem.flops + branch))
    contenders.append(contender(TORCH, check_dense, problem.weight_bytes, 2 * problem.flops))
    return Case("lora", problem, tuple(contenders), TORCH)
