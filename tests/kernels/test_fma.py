"""The plain multiply-add kernels give what the core's operators give."""

import pytest
import torch

from kernels.emulator import Kernel, Out
from kernels.linear import SEED_TENSOR, Problem, Term, assert_close, run_backward, run_forward
from kernels.problem import TYPES, ceil_div, nan, parts

FORWARD = [
    Problem(1, 1, 1, "float"),
    Problem(5, 70, 131, "float", rank=8, bias=True),
    Problem(65, 66, 96, "float", rank=1, nested=True, splits=2),
    Problem(3, 65, 100, "half", "fp4", 32, rank=16, lora_type="half", bias=True, splits=3),
    Problem(7, 9, 33, "bf16", block_size=4096, nested=True, rank=64, lora_type="bf16"),
    Problem(4, 66, 72, "float", "int8", rank=8, bias=True),
    Problem(4, 5, 71, "bf16", "int8"),
]
DROPOUT = [Problem(5, 70, 131, "float", rank=8, dropout_p=0.25), Problem(66, 33, 40, "bf16", rank=16, dropout_p=0.5)]


@pytest.mark.parametrize("p", FORWARD, ids=str)
def test_forward_is_the_product_with_the_decoded_weight(p: Problem) -> None:
    qt = p.weight()
    kernel = Kernel("fma.cu", "fma_forward", p.macros(qt))
    grid = (ceil_div(p.n, 64), ceil_div(p.m, 64), p.splits)
    out = run_forward(kernel, p, grid, 256)
    terms = [Term(out["x"], qt.dequantize(torch.float32).T), Term(p.scaling * out["s"].double(), out["b"].T)]
    assert_close(out["y"], terms, p.type_name, out["bias"])


@pytest.mark.parametrize("p", [*FORWARD, *DROPOUT], ids=str)
def test_backward_is_the_product_with_the_decoded_weight_and_the_masked_branch(p: Problem) -> None:
    qt = p.weight()
    kernel = Kernel("fma.cu", "fma_backward", p.macros(qt))
    out = run_backward(kernel, p, (ceil_div(p.k, 64), ceil_div(p.m, 64), p.splits), 256)
    terms = [Term(out["dy"], qt.dequantize(torch.float32)), Term(out["ds"], out["a"], p.mask())]
    assert_close(out["dx"], terms, p.type_name)


@pytest.mark.parametrize("p", [*FORWARD[1:5], *DROPOUT], ids=str)
def test_the_branch_gives_s_and_its_gradients(p: Problem) -> None:
    macros = p.macros()
    x, dy = p.random(p.m, p.k, seed=4), p.random(p.m, p.n, seed=7)
    s, ds = p.random(p.m, p.rank, seed=5), nan(p.m, p.rank, dtype=torch.float32)
    a, b = p.operands()
    seed = SEED_TENSOR if p.dropout_p else None
    tiles, dropout = ceil_div(p.rank, 64), p.dropout_arguments()
    dropped = x.double() * p.mask()
    lora = TYPES[p.lora_type]

    s_out, db, da = nan(p.m, p.rank, dtype=p.dtype), nan(p.n, p.rank, dtype=lora), nan(p.rank, p.k, dtype=lora)
    work = p.workspace(p.m * p.rank, ceil_div(p.m, 64) * tiles)
    grid = (tiles, ceil_div(p.m, 64), p.splits)
    Kernel("fma_lora.cu", "fma_lora_input", macros)(grid, 256, x, a, seed, Out(s_out), *work, p.m, p.k, *dropout)
    assert_close(s_out, [Term(dropped, a.T)], p.type_name)

    Kernel("fma_lora.cu", "fma_lora_ds", macros)(grid, 256, dy, b, Out(ds), *work, p.m, p.n, p.scaling)
    assert_close(ds, [Term(p.scaling * dy.double(), b)], "float")

    work = p.workspace(p.n * p.rank, ceil_div(p.n, 64) * tiles)
    grid = (tiles, ceil_div(p.n, 64), p.splits)
    Kernel("fma_lora.cu", "fma_lora_db", macros)(grid, 256, dy, s, Out(db), *work, p.m, p.n, p.scaling)
    assert_close(db, [Term(p.scaling * dy.double().T, s)], p.lora_type)

    work = p.workspace(p.rank * p.k, ceil_div(p.k, 64) * tiles)
    grid = (ceil_div(p.k, 64), tiles, p.splits)
    Kernel("fma_lora.cu", "fma_lora_da", macros)(grid, 256, x, ds, seed, Out(da), *work, p.m, p.k, *dropout)
    assert_close(da, [Term(ds.T, dropped)], p.lora_type)


def test_the_whole_chain_agrees_with_the_operator_of_the_core() -> None:
    p = Problem(6, 70, 131, "float", nested=True, rank=8, bias=True, dropout_p=0.25)
    qt, (a, b), bias = p.weight(), p.operands(), p.random(p.n, seed=6)
    x, s = p.random(p.m, p.k, seed=4), nan(p.m, p.rank, dtype=torch.float32)
    y = nan(p.m, p.n, dtype=torch.float32)
    work = p.workspace(0, 4)
    Kernel("fma_lora.cu", "fma_lora_input", p.macros())(
        (1, 1, 1), 256, x, a, SEED_TENSOR, Out(s), *work, p.m, p.k, *p.dropout_arguments()
    )
    Kernel("fma.cu", "fma_forward", p.macros(qt))(
        (2, 1, 1), 256, x, *parts(qt), bias, s, b, Out(y), *work, p.m, p.n, p.k, p.scaling
    )
    codec = (*parts(qt), *qt.codec, p.n, p.k)
    expected, expected_s = torch.ops.ferrolora.linear_lora(x, *codec, bias, a, b, p.scaling, p.dropout_p, SEED_TENSOR)
    # Two orders of the same float32 sums of at most 140 terms, each within 140 · 2⁻²⁴ of the sum of magnitudes.
    bound = 2 * 140 * 2.0**-24
    size = x.abs() @ qt.dequantize(torch.float32).abs().T + p.scaling * s.abs() @ b.abs().T + bias.abs()
    assert ((s - expected_s).abs() <= bound * ((x * p.mask()).abs() @ a.abs().T)).all()
    size_of_s = (x * p.mask()).abs() @ a.abs().T
    assert ((y - expected).abs() <= bound * (size + p.scaling * size_of_s @ b.abs().T)).all()
