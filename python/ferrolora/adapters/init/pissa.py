"""PiSSA: the adapter starts as the principal part of the weight, and the base keeps the rest."""

import torch
from torch import Tensor

from ferrolora.adapters.init.start import Start


def pissa(start: Start) -> Tensor:
    """W = U·S·Vᵀ; B = U_r·sqrt(S_r/s), A = sqrt(S_r/s)·V_rᵀ, and the base becomes W − s·B·A.

    "pissa" takes the exact decomposition; "pissa_niter_<n>" a randomized one with n power iterations.

    Source: PiSSA, arXiv 2404.02948.
    """
    weight, r = start.weight(), start.a.shape[0]
    if start.name == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(str(start.name).rpartition("_")[2]))
        vh = v.T
    root = torch.diag(torch.sqrt(s[:r] / start.scaling))
    start.a.copy_(root @ vh[:r])
    start.b.copy_(u[:, :r] @ root)
    return weight - start.scaling * start.b @ start.a
