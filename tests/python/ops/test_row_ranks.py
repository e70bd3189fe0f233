"""A batch whose rows use different branches, stacked: each row has the product and the gradients of its own."""

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import ferrolora as fl
from ferrolora import _native

N, K, R = 33, 64, 12
SPANS = ((4, 12), (0, 4), (0, 0), (4, 12))  # the rows of a batch of four; the third uses the base alone


def uniform(*shape: int) -> Tensor:
    """In [-1, 1]."""
    return torch.rand(shape) * 2 - 1


def mask_of(rows: int) -> Tensor:
    """1 where a row uses a rank."""
    ranks = torch.arange(R)
    used = [(ranks >= start) & (ranks < end) for start, end in SPANS]
    return torch.stack(used).repeat_interleave(rows // len(SPANS), 0).double()


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("rows", [4, 8, 60, 1000])
@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_values_and_gradients_are_those_of_each_rows_own_branch(quant_type: str, rows: int, dropout_p: float) -> None:
    qt = fl.quantize(torch.randn(N, K) / 8, fl.QuantSpec(quant_type))
    leaves = [uniform(rows, K), uniform(R, K), uniform(N, R)]
    x, a, b = (leaf.requires_grad_() for leaf in leaves)
    dy, seed, kept = uniform(rows, N), torch.tensor(11), torch.empty(rows, K)
    _native.dropout_mask(11, rows, K, dropout_p, kept)
    weight = (qt.codes, qt.absmax, qt.nested_absmax, qt.offset, *qt.codec, N, K)
    flat = [end for span in SPANS for end in span]
    y, s = torch.ops.ferrolora.linear_lora(x, *weight, None, a, b, 0.5, dropout_p, seed, flat)
    got = [y, *torch.autograd.grad(y, (x, a, b), dy)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    branch = ((wide[0] * kept) @ wide[1].T) * mask_of(rows)
    expected = wide[0] @ qt.dequantize(torch.float32).double().T + 0.5 * branch @ wide[2].T
    references = [expected, *torch.autograd.grad(expected, wide, dy.double())]
    assert bool((s.detach()[mask_of(rows) == 0] == 0).all())
    # Sums of float32 products of values of at most 1.4: a sum of t of them errs by at most t² · 2⁻²⁴ · 2, the inner
    # one by t of its own; the longest chain runs over K (or the rows), then R (or N).
    for value, reference, (inner, outer) in zip(got, references, ((K, R), (N, R), (N, rows), (K, rows)), strict=True):
        bound = 2 * 2.0**-24 * (K * K + N * N + inner * outer * (inner + outer))
        torch.testing.assert_close(value.double(), reference, atol=bound, rtol=0)


def test_an_operand_with_row_ranks_is_the_products_one_by_one() -> None:
    qt = fl.quantize(torch.randn(N, K))
    x, a, b = torch.randn(4, 3, K), torch.randn(R, K), torch.randn(N, R)
    mixed = fl.linear(x, qt, lora=fl.LowRank(a, b, 2.0, row_ranks=SPANS))
    for row, (start, end) in enumerate(SPANS):
        own = fl.LowRank(a[start:end], b[:, start:end], 2.0) if end > start else None
        # float32 sums of 64 + 8 products of normal numbers in another order
        torch.testing.assert_close(mixed[row], fl.linear(x[row], qt, lora=own), atol=1e-3, rtol=0)


def test_opcheck_finds_the_operators_clean_with_row_ranks() -> None:
    qt = fl.quantize(torch.randn(N, K))
    weight = (qt.codes, qt.absmax, qt.nested_absmax, qt.offset, *qt.codec, N, K)
    x, a, b = torch.randn(8, K), torch.randn(R, K), torch.randn(N, R)
    flat = [end for span in SPANS for end in span]
    lora = (a, b, 2.0, 0.1, torch.tensor(5))
    opcheck(torch.ops.ferrolora.linear_lora.default, (x, *weight, None, *lora, flat))
    backward = (torch.randn(8, N), x, torch.randn(8, R), *weight, *lora, [True] * 3, flat)
    opcheck(torch.ops.ferrolora.linear_lora_backward.default, backward)


@pytest.mark.parametrize("row_ranks", [((0, 4), (4, 13)), ((5, 4),), ((-1, 4),), ((0, 4), (4, 12), (0, 0))])
def test_row_ranks_that_do_not_fit_are_refused(row_ranks: tuple[tuple[int, int], ...]) -> None:
    qt, a, b = fl.quantize(torch.randn(N, K)), torch.randn(R, K), torch.randn(N, R)
    with pytest.raises(fl.ShapeError, match="row_ranks must be pairs"):
        fl.linear(torch.randn(4, K), qt, lora=fl.LowRank(a, b, 1.0, row_ranks=row_ranks))
    with pytest.raises(fl.UnsupportedError, match="call linear once for each sibling"):
        fl.linear_group(torch.randn(4, K), [fl.Sibling(qt, lora=fl.LowRank(a, b, 1.0, row_ranks=row_ranks))])


def test_an_adapter_that_diverged_does_not_reach_the_rows_of_others() -> None:
    qt, a, b = fl.quantize(torch.randn(N, K)), torch.randn(R, K), torch.randn(N, R)
    b[0, 0] = torch.nan
    with pytest.raises(fl.UnsupportedError, match="lora_B of an adapter in a mixed batch must be finite, got NaN"):
        fl.linear(torch.randn(4, K), qt, lora=fl.LowRank(a, b, 1.0, row_ranks=SPANS))
