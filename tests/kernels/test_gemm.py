"""K3: tensor-core products, forward and backward, held to the product of the values they are made of."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.emulator import Kernel
from kernels.linear import Problem, Term, assert_close, run_backward, run_forward, table_rounded
from kernels.problem import TYPES, ceil_div

SMALL = {"FL_TILE_M": 16, "FL_TILE_N": 64, "FL_WARPS_M": 1, "FL_WARPS_N": 2, "FL_STAGES": 3, "FL_EXACT": 0}
WIDE = {**SMALL, "FL_TILE_M": 32, "FL_TILE_N": 128, "FL_WARPS_M": 2, "FL_STAGES": 4}
TALL = {**SMALL, "FL_TILE_M": 64, "FL_WARPS_M": 4, "FL_WARPS_N": 1}
EXACT = {**SMALL, "FL_EXACT": 1}

FORWARD = [
    Problem(9, 64, 64, "half", constants=SMALL),
    Problem(17, 70, 320, "bf16", nested=True, rank=8, bias=True, constants=SMALL),
    Problem(33, 131, 192, "half", "fp4", 32, rank=16, lora_type="half", constants=WIDE),
    Problem(70, 72, 576, "bf16", block_size=128, nested=True, rank=64, lora_type="bf16", splits=2, constants=TALL),
    Problem(12, 65, 640, "half", rank=1, bias=True, splits=3, constants=SMALL),
    Problem(16, 64, 192, "half", block_size=4096, rank=72, constants=SMALL),
    Problem(20, 70, 192, "bf16", nested=True, rank=8, bias=True, constants=EXACT),
    Problem(10, 66, 128, "half", block_size=32, splits=4, constants=EXACT),
]
BACKWARD = [
    Problem(9, 64, 64, "half", constants=SMALL),
    Problem(17, 200, 96, "bf16", nested=True, rank=8, constants=SMALL),
    Problem(33, 72, 160, "half", "fp4", 32, rank=16, lora_type="half", dropout_p=0.5, constants=WIDE),
    Problem(70, 640, 72 * 4, "bf16", block_size=128, rank=64, lora_type="bf16", splits=2, constants=TALL),
    Problem(12, 328, 224, "half", nested=True, rank=1, dropout_p=0.25, splits=3, constants=WIDE),
    Problem(16, 136, 64, "half", block_size=4096, rank=72, dropout_p=0.1, constants=SMALL),
]


def launch(p: Problem, columns: int) -> dict[str, Any]:
    """Grid, threads and shared bytes, as the table in cuda/README.md gives them."""
    c = p.constants
    grains = (2 if p.block_size == 32 else 1) if columns == p.n else c["FL_TILE_N"] // 32
    rows = c["FL_TILE_N"] if columns == p.n else 64
    slot = c["FL_TILE_M"] * 128 + c["FL_TILE_N"] * 32
    return {
        "grid": (ceil_div(columns, c["FL_TILE_N"]), ceil_div(p.m, c["FL_TILE_M"]), p.splits),
        "threads": 32 * c["FL_WARPS_M"] * c["FL_WARPS_N"],
        "shared": c["FL_STAGES"] * slot + c["FL_TILE_N"] * 256 + 12 * rows * grains,
    }


def rounded(tensor: Tensor, p: Problem) -> Tensor:
    """As an operand of the tensor core."""
    return tensor.to(TYPES[p.type_name]).double()


def forward(p: Problem, **constants: Any) -> dict[str, Any]:
    kernel = Kernel("gemm_4bit.cu", "gemm_4bit", {**p.macros(p.weight()), **constants})
    return run_forward(kernel, p, **launch(p, p.n))


def assert_forward(p: Problem, out: dict[str, Any]) -> None:
    exact = p.constants["FL_EXACT"]
    weight = out["qt"].dequantize(p.dtype) if exact else table_rounded(out["qt"], p.dtype)
    terms = [Term(out["x"], weight.T), Term(p.scaling * out["s"].double(), rounded(out["b"], p).T)]
    assert_close(out["y"], terms, p.type_name, out["bias"])


def assert_backward(p: Problem, out: dict[str, Any]) -> None:
    branch = Term(rounded(out["ds"], p), rounded(out["a"], p), p.mask())
    assert_close(out["dx"], [Term(out["dy"], out["qt"].dequantize(p.dtype)), branch], p.type_name)


@pytest.mark.parametrize("p", FORWARD, ids=str)
def test_forward_is_the_product_with_the_decoded_weight(p: Problem) -> None:
    assert_forward(p, forward(p))


@pytest.mark.parametrize("p", BACKWARD, ids=str)
def test_backward_is_the_product_with_the_decoded_weight_and_the_masked_branch(p: Problem) -> None:
    kernel = Kernel("gemm_4bit_backward.cu", "gemm_4bit_backward", p.macros(p.weight()))
    assert_backward(p, run_backward(kernel, p, **launch(p, p.k)))


def test_the_products_and_copies_of_sm_75_give_the_same_bits() -> None:
    p = FORWARD[0]
    assert torch.equal(forward(p)["y"], forward(p, FL_ARCH=75)["y"])


def test_the_exact_mode_multiplies_the_bits_that_dequantization_gives() -> None:
    # One row of x picks out each column of the weight: no sum rounds, so y must be the dequantized weight, bit for bit.
    p = replace(FORWARD[6], m=16, k=64, rank=0, bias=False)
    kernel = Kernel("gemm_4bit.cu", "gemm_4bit", p.macros(p.weight()))
    out = run_forward(kernel, p, **launch(p, p.n), x=torch.eye(16, 64))
    assert torch.equal(out["y"].T, p.weight().dequantize(p.dtype)[:, :16])


def test_the_order_of_warps_and_blocks_changes_no_bit() -> None:
    p = FORWARD[4]
    kernel = Kernel("gemm_4bit.cu", "gemm_4bit", p.macros(p.weight()))
    outputs = [run_forward(kernel, p, **launch(p, p.n), seed=seed)["y"] for seed in range(4)]
    assert all(outputs[0].equal(y) for y in outputs)
