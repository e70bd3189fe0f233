"""A kernel that is broken on purpose is caught: the tests of this directory see what they are for."""

import pytest

from kernels.emulator import CUDA, EmulationError, Kernel, source_of
from kernels.linear import Problem, run_forward
from kernels.test_gemm import SMALL, assert_forward, launch

PROBLEM = Problem(20, 70, 320, "half", nested=True, rank=8, bias=True, constants=SMALL)


def run(replacements: dict[str, str], seed: int = 0) -> None:
    """The forward product with its headers written into one text, in which each key is replaced by its value."""
    text = inlined("gemm_4bit.cu", set())
    for old, new in replacements.items():
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the source"
        text = text.replace(old, new)
    kernel = Kernel("gemm_4bit.cu", "gemm_4bit", PROBLEM.macros(PROBLEM.weight()), text)
    assert_forward(PROBLEM, run_forward(kernel, PROBLEM, **launch(PROBLEM, PROBLEM.n), seed=seed))


def inlined(file: str, seen: set[str]) -> str:
    """A source with our device headers in the place of their first inclusion."""
    lines = []
    for line in source_of(file).splitlines():
        if line.startswith('#include "') and "host/" not in line:
            path = line.split('"')[1]
            header = path if (CUDA / path).exists() else f"common/{path}"
            if header not in seen:
                seen.add(header)
                lines.append(inlined(header, seen))
        elif not line.startswith("#pragma once"):
            lines.append(line)
    return "\n".join(lines).replace("../host/", "host/")


def test_the_kernel_is_right_unless_it_is_broken() -> None:
    run({})


BARRIER = "        block_barrier();                // and step is decoded; nobody still reads what follows overwrites\n"
INDEX = "? (r * k + c) / 2 : 0)"
WAIT = "        cp_async_wait<FL_STAGES - 3>(); // step + 1 is here\n"


@pytest.mark.parametrize(
    ("replacements", "message"),
    [
        pytest.param({BARRIER: ""}, "race: |nobody wrote|on its way", id="barrier removed"),
        pytest.param({WAIT: ""}, "on its way", id="wait removed"),
        pytest.param(
            {"? (r * k + c) / 2 : 0)": "? (r * k + c) / 2 + 16 : 0)"}, "out of bounds: read by cp.async", id="index off"
        ),
    ],
)
def test_a_missing_barrier_a_missing_wait_and_an_index_that_is_off_are_reported(
    replacements: dict[str, str], message: str
) -> None:
    for seed in range(3):
        with pytest.raises(EmulationError, match=message):
            run(replacements, seed)


FRAGMENT = "col + matrix / 2 * 8 + line, 2 * step + matrix % 2"
SECOND_PRODUCT = "Mma<T>::add(at[i][j + 1], left[i], right[2], right[3]);"
SCALING = "sums.at[i][j][e] += pair.at[e % 2] * part.at[i][j][e];"
DECODED = "store(reinterpret_cast<Words4*>(tile + chunk_offset<TILE_ROW_BYTES>(row, chunk)),"


@pytest.mark.parametrize(
    "replacements",
    [
        pytest.param({FRAGMENT: "col + matrix % 2 * 8 + line, 2 * step + matrix / 2"}, id="matrices swapped"),
        pytest.param({SECOND_PRODUCT: SECOND_PRODUCT.replace("2], right[3", "3], right[2")}, id="registers swapped"),
        pytest.param({SCALING: SCALING.replace("e % 2", "e / 2")}, id="scale of another column"),
        pytest.param({DECODED: DECODED.replace("chunk)),", "chunk ^ 1)),")}, id="decoded to the neighbour"),
    ],
)
def test_a_wrong_layout_gives_wrong_numbers(replacements: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match="differ, first at"):
        run(replacements)
