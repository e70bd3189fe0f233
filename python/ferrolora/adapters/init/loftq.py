"""LoftQ: the adapter starts as the best low-rank correction of the quantization error."""

import torch
from torch import Tensor

from ferrolora.adapters.init.start import Start


def loftq(start: Start) -> Tensor:
    """Alternates Q = quantized(W − s·B·A) and s·B·A = the rank-r part of W − Q, `loftq_iter` times (default 1).

    The base becomes the last Q. With one iteration that is quantized(W), so a packed base keeps its bytes.

    Source: LoftQ, arXiv 2310.08659, algorithm 1.
    """
    weight, r = start.weight(), start.a.shape[0]
    low_rank = torch.zeros_like(weight)
    rest = quantized = weight
    for _ in range(int(start.options.get("loftq_iter", 1))):
        rest = weight - low_rank
        quantized = start.quantized(rest)
        u, s, vh = torch.linalg.svd(weight - quantized, full_matrices=False)
        root = torch.sqrt(s[:r] / start.scaling)
        start.a.copy_(root[:, None] * vh[:r])
        start.b.copy_(u[:, :r] * root)
        low_rank = start.scaling * start.b @ start.a
    return rest if start.packed else quantized
