"""The planner and the kernel table as Python sees them; their properties are tested in Rust."""

import pytest

from ferrolora import UnsupportedError, _native
from ferrolora.cuda.launch import problem


def test_a_plan_names_kernel_constants_grid_and_arguments() -> None:
    plan = _native.cuda_plan(problem("linear", dtype="bfloat16", m=1, n=4096, k=4096, nested=True), 90)
    assert plan is not None
    assert (plan["file"], plan["entry"]) == ("gemv_4bit.cu", "gemv_4bit")
    assert plan["constants"]["FL_TYPE"] == "bf16"
    assert plan["constants"]["FL_NESTED"] == "1"
    by_name = {argument["name"]: argument for argument in plan["arguments"]}
    assert by_name["absmax"] == {
        "name": "absmax", "type": "void*", "role": "tensor", "dtype": "uint8", "numel": 4096 * 64
    }  # fmt: skip
    assert (by_name["k"]["role"], by_name["k"]["bits"]) == ("fixed", 4096)
    assert plan["scratch_bytes"] == 4 * by_name["partial"]["numel"]
    assert plan["counters"] == by_name["counters"]["numel"]


def test_many_rows_have_no_kernel_but_the_library() -> None:
    asked = problem("linear", dtype="bfloat16", m=4096, n=4096, k=4096)
    assert _native.cuda_plan(asked, 90) is None
    fused = _native.cuda_plan({**asked, "kernel": "gemm_4bit"}, 90)
    assert fused is not None
    assert fused["entry"] == "gemm_4bit"


def test_a_larger_device_splits_more() -> None:
    asked = problem("linear", dtype="float16", m=1, n=1024, k=8192)
    small, large = (_native.cuda_plan(asked, 90, count) for count in (8, 128))
    assert small is not None
    assert large is not None
    assert small["grid"][2] < large["grid"][2]


def test_the_table_lists_what_plans_use() -> None:
    rows = {row["entry"]: row for row in _native.cuda_kernels()}
    plan = _native.cuda_plan(problem("linear", dtype="float32", m=2, n=64, k=64), 75)
    assert plan is not None
    row = rows[plan["entry"]]
    assert sorted(plan["constants"]) == sorted(row["constants"])
    assert [(a["name"], a["type"]) for a in plan["arguments"]] == row["parameters"]


def test_what_no_kernel_takes_is_refused_with_the_reason() -> None:
    asked = problem("linear", dtype="float32", m=4, n=64, k=64, kernel="gemm_4bit")
    with pytest.raises(UnsupportedError, match=r"linear: no kernel for m 4, n 64, k 64, float32.*not float32"):
        _native.cuda_plan(asked, 90)
    with pytest.raises(UnsupportedError, match=r"compute capability must be one of 75, 80.*got 61"):
        _native.cuda_plan(problem("linear", m=1), 61)
    with pytest.raises(UnsupportedError, match=r'op must be one of dequantize, .*got "multiply"'):
        _native.cuda_plan(problem("multiply"), 90)
    with pytest.raises(TypeError, match="a problem has no rows"):
        problem("linear", rows=4)


def test_crossovers_lie_where_others_measured_them() -> None:
    # T4, A100, A10, 4090, H100, B200 and sm_120
    published = {
        75: (32, 128),
        80: (16, 128),
        86: (16, 128),
        89: (64, 256),
        90: (16, 64),
        100: (32, 32),
        120: (64, 256),
    }
    for sm, (low, high) in published.items():
        assert low <= _native.cuda_fused_rows(sm) <= high
