"""OLoRA: the adapter starts as the first part of the weight's QR decomposition."""

import torch
from torch import Tensor

from ferrolora.adapters.init.start import Start


def olora(start: Start) -> Tensor:
    """W = Q·R; B = Q[:, :r] (orthonormal columns), A = R[:r], and the base becomes W − s·B·A.

    Source: OLoRA, arXiv 2406.01775.
    """
    weight, r = start.weight(), start.a.shape[0]
    q, upper = torch.linalg.qr(weight)
    start.a.copy_(upper[:r])
    start.b.copy_(q[:, :r])
    return weight - start.scaling * start.b @ start.a
