"""Random operands of a work, and the check of a result before it is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from ferrolora.bench.gpu.goals import RANK
from ferrolora.errors import FerroloraError
from ferrolora.ops.linear import LowRank

DTYPE = torch.bfloat16
SCALING = 0.5


def normal(rows: int, columns: int, device: str = "cuda") -> Tensor:
    """Standard normal values in bfloat16."""
    return torch.randn(rows, columns, dtype=DTYPE, device=device)


def branch(n: int, k: int, device: str = "cuda") -> LowRank:
    """A low-rank branch of float32 factors that want gradients."""
    a, b = torch.randn(RANK, k, device=device) / k**0.5, torch.randn(n, RANK, device=device)
    return LowRank(a.requires_grad_(), b.requires_grad_(), SCALING)


def relative_error(work: str, got: Tensor, right: Tensor) -> float:
    """Of a result, by the norm.

    Each term is rounded at most four times to the type of got, by half of 2⁻⁷ of it for bfloat16, and the errors of a
    random product add up like its terms: relative to the norm they stay at that.

    Raises:
        FerroloraError: it is more than rounding explains.
    """
    error = float((got.float() - right.float()).norm() / right.float().norm())
    most = 4 * torch.finfo(got.dtype).eps / 2
    if not error <= most:
        raise FerroloraError(f"{work}: the result is wrong by {error:.2e} of its norm, at most {most:.2e} is rounding")
    return error
