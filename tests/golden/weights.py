"""The kinds of weight a codec meets, as float32 tensors of any shape; the same numbers for the same arguments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from golden import bitsandbytes_rule as rule

KINDS = ("random", "constant", "zeros", "half-zero", "subnormal", "tiny", "huge", "wide", "minus-zero", "thresholds")
SEED = 20240521


def weight(kind: str, shape: tuple[int, ...], seed: int = SEED) -> Tensor:
    """A weight of a kind: random normal, one value, extremes of the exponent, or the edges between codes."""
    numel = math.prod(shape)
    generator = torch.Generator().manual_seed(seed + numel)
    normal = torch.randn(numel, generator=generator)
    exponents = torch.randint(-20, 20, (numel,), generator=generator)
    values = {
        "random": lambda: normal,
        "constant": lambda: torch.full((numel,), -0.75),
        "zeros": lambda: torch.zeros(numel),
        "half-zero": lambda: normal * (torch.arange(numel) >= numel // 2),
        "subnormal": lambda: normal * 1e-39,
        "tiny": lambda: normal * 1e-30,
        "huge": lambda: normal.clamp(-3, 3) * 1e38,
        "wide": lambda: normal * torch.exp2(exponents.float()),
        "minus-zero": lambda: torch.where(normal < 0, -torch.zeros(numel), normal),
        "thresholds": lambda: threshold_neighbours(numel),
    }
    return values[kind]().reshape(shape)


def threshold_neighbours(numel: int) -> Tensor:
    """Every threshold of both types and its float32 neighbours, behind a 1.0 that makes the block's scale 1."""
    nf4 = rule.table("nf4")
    fp4 = torch.tensor([value for value, _ in rule.FP4_STEPS])
    centres = torch.cat([(nf4[:-1] + nf4[1:]) / 2, fp4, -fp4])
    line = torch.cat([torch.cat([torch.ones(1), part]) for part in with_neighbours(centres).split(31)])
    return line.repeat(-(-numel // line.numel()))[:numel]


def with_neighbours(centres: Tensor) -> Tensor:
    """The float32 values just below, at and just above each centre."""
    below, above = (torch.nextafter(centres, torch.tensor(end)) for end in (-2.0, 2.0))
    return torch.cat([below, centres, above])
