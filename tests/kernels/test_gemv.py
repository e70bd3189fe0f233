"""K2: up to eight rows of x, held to the product with the 16-bit table and exact scales."""

from dataclasses import replace

import pytest

from kernels.emulator import Kernel
from kernels.linear import Problem, Term, assert_close, run_forward, table_rounded
from kernels.problem import ceil_div

DEFAULT = {"FL_PAIR_TABLE": 0, "FL_WARPS": 2, "FL_TILES": 1}
PROBLEMS = [
    Problem(1, 16, 64, "half"),
    Problem(1, 33, 320, "bf16", "fp4", rank=8, bias=True, constants={"FL_WARPS": 4}),
    Problem(8, 17, 640, "half", nested=True, rank=1, splits=2),
    Problem(3, 48, 256, "bf16", block_size=32, rank=16, lora_type="bf16", constants={"FL_TILES": 2}),
    Problem(5, 20, 896, "half", block_size=128, nested=True, bias=True, splits=3, constants={"FL_WARPS": 1}),
    Problem(2, 40, 384, "bf16", block_size=4096, rank=64, lora_type="half"),
    Problem(4, 30, 1216, "half", rank=12, constants={"FL_PAIR_TABLE": 1}),
    Problem(7, 31, 96, "bf16", "fp4", 32, nested=True, bias=True, constants={"FL_PAIR_TABLE": 1, "FL_TILES": 2}),
]


def check(p: Problem, seed: int = 0) -> None:
    p = replace(p, constants={**DEFAULT, **p.constants})
    kernel = Kernel("gemv_4bit.cu", "gemv_4bit", p.macros(p.weight()))
    grid = (ceil_div(p.n, 16 * p.constants["FL_TILES"]), 1, p.splits)
    out = run_forward(kernel, p, grid, 32 * p.constants["FL_WARPS"], seed=seed)
    terms = [Term(out["x"], table_rounded(out["qt"], p.dtype).T), Term(p.scaling * out["s"].double(), out["b"].T)]
    assert_close(out["y"], terms, p.type_name, out["bias"])


@pytest.mark.parametrize("p", PROBLEMS, ids=str)
def test_few_rows_are_the_product_with_the_decoded_weight(p: Problem) -> None:
    check(p)


def test_the_order_of_warps_and_blocks_changes_no_bit() -> None:
    p = replace(PROBLEMS[2], constants={**DEFAULT, "FL_WARPS": 4})
    kernel = Kernel("gemv_4bit.cu", "gemv_4bit", p.macros(p.weight()))
    outputs = [run_forward(kernel, p, (2, 1, p.splits), 128, seed=seed)["y"] for seed in range(4)]
    assert all(outputs[0].equal(y) for y in outputs)


def test_the_products_of_sm_75_give_the_same() -> None:
    check(Problem(3, 20, 192, "half", rank=8, constants={"FL_ARCH": 75}))
