"""Several tensors of one shape made into one: THE table of ways, and the functions it names."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ferrolora.errors import UnsupportedError

# (tensors, one weight each, density, how TIES elects signs) -> one tensor
Combination = Callable[[Sequence[Tensor], Tensor, float, str], Tensor]


def _linear(tensors: Sequence[Tensor], weights: Tensor, density: float, election: str) -> Tensor:
    """Σ w·T. Source: task arithmetic, arXiv 2212.04089."""
    return _weighted(tensors, weights).sum(0)


def _magnitude_prune(tensors: Sequence[Tensor], weights: Tensor, density: float, election: str) -> Tensor:
    """Σ w·T with the largest `density` share of each T."""
    return _weighted([largest(tensor, density) for tensor in tensors], weights).sum(0)


def _ties(tensors: Sequence[Tensor], weights: Tensor, density: float, election: str) -> Tensor:
    """The largest values of each, those of the elected sign, averaged. Source: TIES, arXiv 2306.01708."""
    return _elected([largest(tensor, density) for tensor in tensors], weights, election)


def _dare_linear(tensors: Sequence[Tensor], weights: Tensor, density: float, election: str) -> Tensor:
    """Σ w·T with a random `density` share of each T, divided by it. Source: DARE, arXiv 2311.03099."""
    return _weighted([sampled(tensor, density) for tensor in tensors], weights).sum(0)


def _dare_ties(tensors: Sequence[Tensor], weights: Tensor, density: float, election: str) -> Tensor:
    """DARE's samples combined as TIES does."""
    return _elected([sampled(tensor, density) for tensor in tensors], weights, election)


COMBINATIONS: dict[str, Combination] = {
    "linear": _linear,
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
    "magnitude_prune": _magnitude_prune,
}
NEED_DENSITY = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
ELECTIONS = ("total", "frequency")


def largest(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with all but its largest `density` share of values, by magnitude, set to zero."""
    flat = tensor.flatten()
    kept = torch.topk(flat.abs(), int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(tensor.shape)


def sampled(tensor: Tensor, density: float) -> Tensor:
    """`tensor` with each value kept with probability `density` and divided by it, else zero."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


def check_combination(name: str, density: float | None, election: str) -> None:
    """Raises UnsupportedError for an unknown way, or a missing or impossible density."""
    plain = name.removesuffix("_svd")
    valid = [*COMBINATIONS, "cat", "svd", *(f"{way}_svd" for way in NEED_DENSITY)]
    if name not in valid:
        raise UnsupportedError(f"combination_type={name!r} is unknown; choose one of {', '.join(valid)}")
    if plain in NEED_DENSITY and (density is None or not 0.0 < density <= 1.0):
        raise UnsupportedError(f"combination_type={name!r} needs a density in (0, 1], not {density!r}")
    if election not in ELECTIONS:
        raise UnsupportedError(f"majority_sign_method={election!r} is unknown; choose one of {', '.join(ELECTIONS)}")


def _weighted(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    stacked = torch.stack(list(tensors))
    return stacked * weights.to(stacked).view(-1, *[1] * (stacked.dim() - 1))


def _elected(tensors: Sequence[Tensor], weights: Tensor, election: str) -> Tensor:
    stacked = torch.stack(list(tensors))
    votes = stacked if election == "total" else stacked.sign()
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == elected
    return (_weighted(tensors, weights) * agrees).sum(0) / agrees.sum(0).clamp_min(1)
