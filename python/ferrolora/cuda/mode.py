"""How products on a GPU may be computed: the fastest way, or the one that has the bits of a decoded weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0  # of the `exact` blocks that are entered


@contextmanager
def exact() -> Iterator[None]:
    """Within this block, products with a packed weight on a GPU have the bits of dequantizing, then multiplying.

        with ferrolora.cuda.exact():
            loss = model(**batch).loss
            loss.backward()

    Without a branch, forward is `torch.addmm(bias, x, qt.dequantize(x.dtype).t())` and backward
    `dY @ qt.dequantize(dY.dtype)`, bit for bit, whatever the number of rows: the weight is decoded into the workspace
    and torch multiplies. A low-rank branch is computed as ever and added to that, rounded once more.

    Without the block, few rows take the fused kernels, which sum in an order of their own and scale the sums of rounded
    table values; they read a quarter of the bytes.

    It holds for the whole process, not for a thread: autograd runs backward in threads of its own, so that backward has
    to be called within the block too. A CUDA graph keeps what it was captured with. Without effect on a CPU.

    Raises (backward, within the block):
        UnsupportedError: dropout on a branch where no kernel can add its gradient afterwards: float32, and bfloat16
            before compute capability 8.0.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def required_kernel() -> str | None:
    """The planner's name for what products must go through; None for its own choice."""
    return "library" if _depth else None
