"""`linear`: y = x·deq(W)ᵀ + bias, with a low-rank branch fused in when one is given."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ferrolora.errors import ShapeError
from ferrolora.ops.checks import FLOAT_TYPES, require_device
from ferrolora.tensor import QuantTensor


class LowRank(NamedTuple):
    """A low-rank branch `scaling·B(A(drop(x)))`.

    Args:
        A: float `[r, K]`.
        B: float `[N, r]`, the type of A.
        scaling: factor of the branch (alpha / r in LoRA).
        dropout_p: probability that an element of x is dropped for this branch; kept ones are multiplied by
            1 / (1 - p). At least 0, below 1. Default 0.0: no dropout.
        row_ranks: for a batch whose rows have different adapters: A and B are those of all adapters stacked, and each
            pair (start, end) names the ranks that the next rows of x use, all pairs for equally many rows; (0, 0) is
            no adapter. On the CPU, A and B must then be finite. Default (): every row uses all ranks.
    """

    A: Tensor
    B: Tensor
    scaling: float
    dropout_p: float = 0.0
    row_ranks: Sequence[tuple[int, int]] = ()


def linear(x: Tensor, qt: QuantTensor, bias: Tensor | None = None, lora: LowRank | None = None) -> Tensor:
    """Linear map through a quantized weight: `y = x·deq(W)ᵀ + bias + scaling·(drop(x)·Aᵀ)·Bᵀ`, summed in float32.

    Differentiable once in x, bias, A and B; the weight is never materialised and never gets a gradient.
    Under `torch.autocast` x is cast as `torch.nn.functional.linear` would cast it.

    Args:
        x: float32, float16 or bfloat16 `[..., K]`, any strides; zero rows are fine.
        qt: the weight, shape `[N, K]`.
        bias: float `[N]`. Default None.
        lora: the low-rank branch. Default None. Its dropout draws one seed from torch's generator, so
            `torch.manual_seed` and gradient checkpointing govern it.

    Returns:
        `[..., N]` in the type of x.

    Raises:
        ShapeError: x, bias, A or B do not fit the weight, or the weight is not a matrix.
        UnsupportedError: a type or a device without a kernel; second derivatives.

    Source: QLoRA, arXiv 2305.14314; LoRA, arXiv 2106.09685.
    """
    if len(qt.shape) != 2:
        raise ShapeError(f"linear: the weight must be [N, K], not {list(qt.shape)}")
    return linear_packed(
        x, qt.codes, qt.absmax, qt.nested_absmax, qt.offset, *qt.codec, qt.shape[0], qt.shape[1], bias, lora
    )


def dropout_seed(device: torch.device) -> Tensor:
    """A key for one mask, from torch's generator of that device: a captured CUDA graph draws anew at each replay."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def linear_packed(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    n: int,
    k: int,
    bias: Tensor | None,
    lora: LowRank | None,
) -> Tensor:
    """`linear` over the parts of a QuantTensor of shape `[n, k]` that was checked when it was made."""
    require_device("linear", x, (quant_type, block_size), weight=codes, scales=absmax, bias=bias)
    if torch.is_autocast_enabled(x.device.type) and x.dtype in FLOAT_TYPES:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight = (codes, absmax, nested_absmax, offset, quant_type, block_size, n, k)
    if lora is None:
        y: Tensor = torch.ops.ferrolora.linear(x, *weight, bias)
        return y
    a, b, scaling, dropout_p, row_ranks = lora
    require_device("linear", x, (quant_type, block_size), A=a, B=b)
    seed = dropout_seed(x.device) if dropout_p > 0.0 else None
    branch = (a, b, scaling, dropout_p, seed, list(chain(*row_ranks)))
    y, _ = torch.ops.ferrolora.linear_lora(x, *weight, bias, *branch)
    return y
