"""K4: the low-rank branch on tensor cores, held to products of the rounded operands."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.emulator import Kernel, Out
from kernels.linear import SEED_TENSOR, Problem, Term, assert_close
from kernels.problem import TYPES, ceil_div, nan

PROBLEMS = [
    Problem(5, 64, 72, "half", rank=8),
    Problem(70, 136, 200, "bf16", rank=16, lora_type="bf16", dropout_p=0.25, splits=2),
    Problem(130, 320, 264, "half", rank=1, lora_type="half", splits=3),
    Problem(64, 128, 320, "bf16", rank=64, dropout_p=0.5),
    Problem(20, 72, 136, "half", rank=100, splits=2),
    Problem(1, 192, 640, "bf16", rank=40, dropout_p=0.1, splits=4),
]
# Parts of 64×64, so that several blocks share each row and column; and of all that there is.
PARTS = [{"FL_ROWS": 64, "FL_COLUMNS": 64}, {"FL_ROWS": 192, "FL_COLUMNS": 128}]


def seed(p: Problem) -> Tensor | None:
    return SEED_TENSOR if p.dropout_p else None


def rounded(tensor: Tensor, p: Problem) -> Tensor:
    return tensor.to(p.dtype).double()


def dropped(x: Tensor, p: Problem) -> Tensor:
    return x.double() * p.mask()


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_the_input_product_is_of_the_dropped_x(p: Problem) -> None:
    x, a, s = p.random(p.m, p.k, seed=4), p.operands()[0], nan(p.m, p.rank, dtype=p.dtype)
    grid = (ceil_div(p.rank, 64), ceil_div(p.m, 64), p.splits)
    work = p.workspace(p.m * p.rank, grid[0] * grid[1])
    kernel = Kernel("lora.cu", "lora_input", p.macros())
    kernel(grid, 128, x, a, seed(p), Out(s), *work, p.m, p.k, *p.dropout_arguments())
    assert_close(s, [Term(dropped(x, p), rounded(a, p).T)], p.type_name)
    assert not work[1].tensor.any()


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_the_output_gradients_come_from_one_read_of_dy(p: Problem, part: dict[str, Any]) -> None:
    dy, s, b = p.random(p.m, p.n, seed=7), p.random(p.m, p.rank, seed=5), p.operands()[1]
    ds, db = nan(p.m, p.rank, dtype=torch.float32), nan(p.n, p.rank, dtype=TYPES[p.lora_type])
    grid = (ceil_div(p.n, part["FL_COLUMNS"]), ceil_div(p.m, part["FL_ROWS"]), ceil_div(p.rank, 64))
    counters = torch.zeros((grid[0] + grid[1]) * grid[2], dtype=torch.int32)
    ds_partial, db_partial = nan(grid[0], p.m, p.rank, dtype=ds.dtype), nan(grid[1], p.n, p.rank, dtype=ds.dtype)
    kernel = Kernel("lora.cu", "lora_output_gradients", {**p.macros(), **part})
    outputs = (Out(ds), Out(db), Out(ds_partial), Out(db_partial), Out(counters))
    kernel(grid, 128, dy, b, s, *outputs, p.m, p.n, p.scaling)
    assert_close(ds, [Term(p.scaling * dy.double(), rounded(b, p))], "float")
    assert_close(db, [Term(p.scaling * dy.double().T, s)], p.lora_type)
    assert not counters.any()


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_the_input_gradient_is_of_the_dropped_x(p: Problem, part: dict[str, Any]) -> None:
    x, ds = p.random(p.m, p.k, seed=4), p.random(p.m, p.rank, seed=8, dtype=torch.float32)
    da = nan(p.rank, p.k, dtype=TYPES[p.lora_type])
    grid = (ceil_div(p.k, part["FL_COLUMNS"]), ceil_div(p.m, part["FL_ROWS"]), ceil_div(p.rank, 64))
    counters = torch.zeros((grid[0] + grid[1]) * grid[2], dtype=torch.int32)
    partial = nan(grid[1], p.k, p.rank, dtype=ds.dtype)
    kernel = Kernel("lora.cu", "lora_input_gradient", {**p.macros(), **part})
    outputs = (Out(da), Out(partial), Out(counters))
    kernel(grid, 128, x, ds, seed(p), *outputs, p.m, p.k, *p.dropout_arguments())
    assert_close(da, [Term(rounded(ds, p).T, dropped(x, p))], p.lora_type)
    assert not counters.any()


@pytest.mark.parametrize("p", [*PROBLEMS, Problem(3, 37, 41, "half", rank=3, dropout_p=0.5)], ids=str)
def test_the_branch_is_added_to_what_is_there(p: Problem) -> None:
    a, b = p.operands()
    s, ds = p.random(p.m, p.rank, seed=5), p.random(p.m, p.rank, seed=8, dtype=torch.float32)
    y, dx = p.random(p.m, p.n, seed=9), p.random(p.m, p.k, seed=10)
    before = y.double(), dx.double()
    macros = p.macros()
    Kernel("lora_add.cu", "lora_add_output", macros)(
        (ceil_div(p.n, 64), ceil_div(p.m, 64), 1), 128, s, b, Out(y), p.m, p.n, p.scaling
    )
    assert_close(y, [Term(p.scaling * s.double(), rounded(b, p).T)], p.type_name, before[0])
    Kernel("lora_add.cu", "lora_add_input_gradient", macros)(
        (ceil_div(p.k, 64), ceil_div(p.m, 64), 1), 128, ds, a, seed(p), Out(dx), p.m, p.k, *p.dropout_arguments()
    )
    assert_close(dx, [Term(rounded(ds, p), rounded(a, p), p.mask())], p.type_name, before[1])
