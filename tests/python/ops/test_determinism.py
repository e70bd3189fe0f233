"""The same bits from any number of threads, and from any instruction set where the format fixes the bytes."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

import ferrolora as fl
from ferrolora import _native
from ferrolora.ops.quantize_blockwise import quantize_blockwise

# Large enough that every kernel splits its work.
N, K, R = 192, 1056, 16


def codec_results() -> list[Tensor]:
    """Every codec, both ways, on a fixed input."""
    generator = torch.Generator().manual_seed(1)
    results = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        w = torch.randn(301, 1003, generator=generator).to(dtype)
        for spec in (fl.QuantSpec("nf4"), fl.QuantSpec("fp4", 128, double_quant=False), fl.QuantSpec("int8")):
            qt = fl.quantize(w, spec)
            results += [qt.codes, qt.absmax, qt.dequantize(dtype)]
            results += [] if qt.nested_absmax is None or qt.offset is None else [qt.nested_absmax, qt.offset]
        results += quantize_blockwise(w, 256)
    return results


def linear_results(quant_type: str, dtype: torch.dtype, rows: int) -> list[Tensor]:
    """Value and all gradients of one call."""
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(shape, generator=generator) for shape in ((N, K), (rows, K), (N,), (R, K), (N, R), (rows, N))]
    qt = fl.quantize(draw[0], fl.QuantSpec(quant_type))
    x, bias, a, b = (tensor.to(dtype).requires_grad_() for tensor in draw[1:5])
    torch.manual_seed(2)
    y = fl.linear(x, qt, bias, fl.LowRank(a, b, 0.5, 0.1))
    return [y, fl.linear(x, qt), *torch.autograd.grad(y, (x, bias, a, b), draw[5].to(dtype))]


Threads = Callable[[int], AbstractContextManager[None]]


def test_codecs_do_not_depend_on_threads(threads: Threads) -> None:
    with threads(1):
        one = codec_results()
    for count in (2, 3):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(one, codec_results(), strict=True))


@pytest.mark.parametrize("rows", [1, 7, 64, 333])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_values_and_gradients_do_not_depend_on_threads(
    quant_type: str, dtype: torch.dtype, rows: int, threads: Threads
) -> None:
    with threads(1):
        one = linear_results(quant_type, dtype, rows)
    for count in (2, 3):
        with threads(count):
            assert all(torch.equal(a, b) for a, b in zip(one, linear_results(quant_type, dtype, rows), strict=True))


@pytest.mark.parametrize("outputs", [1, 2, 3, 33])
def test_the_bias_gradient_of_many_rows_does_not_depend_on_threads(outputs: int, threads: Threads) -> None:
    qt = fl.quantize(torch.randn(outputs, 8))
    x, dy = torch.randn(70_001, 8), torch.randn(70_001, outputs)
    bias = torch.zeros(outputs, requires_grad=True)

    def gradient() -> Tensor:
        return torch.autograd.grad(fl.linear(x, qt, bias), bias, dy)[0]

    with threads(1):
        one = gradient()
    for count in (2, 3):
        with threads(count):
            assert torch.equal(gradient(), one)


CODEC_HASH = """
import hashlib, sys, torch
sys.path.insert(0, {directory!r})
import ferrolora
from ferrolora import _native
from test_determinism import codec_results
digest = hashlib.sha256()
for tensor in codec_results():
    digest.update(bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
print(_native.isa(), digest.hexdigest())
"""


@pytest.mark.slow
def test_codecs_do_not_depend_on_the_instruction_set() -> None:
    directory = __file__.rpartition("/")[0]
    hashes = {}
    for isa in _native.available_isas():
        done = subprocess.run(
            [sys.executable, "-c", CODEC_HASH.format(directory=directory)],
            env={**os.environ, "FERROLORA_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        ran_on, digest = done.stdout.split()
        assert ran_on == isa
        hashes[isa] = digest
    assert "scalar" in hashes
    assert len(set(hashes.values())) == 1, hashes


@pytest.mark.slow
def test_an_unknown_instruction_set_is_refused_with_the_available_ones() -> None:
    code = "import torch, ferrolora as fl\nfl.quantize(torch.ones(64))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env={**os.environ, "FERROLORA_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "sse9" in done.stderr
    assert "scalar" in done.stderr
