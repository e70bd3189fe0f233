"""bitsandbytes' own functions and layers on our kernels, against what they gave before."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

from ferrolora.integrations import bitsandbytes as backend

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    yield
    backend.disable()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [64, 4096])
def test_codes_are_as_near_and_decode_to_the_same_values(dtype: torch.dtype, quant_type: str, block_size: int) -> None:
    weight = torch.randn(96, 256, dtype=dtype)
    options = {"blocksize": block_size, "quant_type": quant_type}
    codes, state = functional.quantize_4bit(weight, **options)
    decoded = functional.dequantize_4bit(codes, state)
    assert "quantize_4bit" in backend.enable()
    # both round the product of a table value and a scale to dtype once
    torch.testing.assert_close(functional.dequantize_4bit(codes, state), decoded, rtol=0, atol=0)
    ours, our_state = functional.quantize_4bit(weight, **options)
    assert torch.equal(our_state.absmax, state.absmax)
    # Our codes are those of bitsandbytes' CUDA kernels. Its CPU code has other literals between fp4's values, so a
    # value there is as near to both neighbours, up to the seventh digit of the literals and a rounding to dtype.
    ours_away, away = (
        (functional.dequantize_4bit(c, s).float() - weight.float()).abs()
        for c, s in ((ours, our_state), (codes, state))
    )
    slack = state.absmax.max() * (2**-20 + 2 * torch.finfo(dtype).eps)
    assert (ours_away <= away + slack).all()
    if quant_type == "nf4":
        assert torch.equal(ours, codes)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_a_product_is_at_most_twice_as_far_from_the_exact_one_as_theirs(
    dtype: torch.dtype, storage: torch.dtype, nested: bool
) -> None:
    weight, x = torch.randn(96, 256, dtype=dtype), torch.randn(3, 5, 256, dtype=dtype)
    bias = torch.randn(96, dtype=dtype)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    theirs = bnb.matmul_4bit(x, codes, state, bias=bias)
    state.dtype = torch.float32
    exact = x.double() @ functional.dequantize_4bit(codes, state).double().T + bias.double()
    backend.enable()
    ours = bnb.matmul_4bit(x, codes, state, bias=bias)
    assert ours.dtype == dtype
    # AMX rounds the decoded weight to bfloat16, as theirs does before it multiplies
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_a_layer_trains_to_the_same_gradients() -> None:
    layer = bnb.nn.Linear4bit(128, 40, quant_type="nf4", compute_dtype=torch.float32).to("cpu").train()
    x = torch.randn(6, 128, requires_grad=True)

    def gradients() -> tuple[Tensor, Tensor]:
        layer.bias.grad = x.grad = None
        layer(x).square().sum().backward()
        return x.grad.clone(), layer.bias.grad.clone()

    theirs = gradients()
    backend.enable()
    # float32 sums of at most 128 products of order 1, taken in another order
    torch.testing.assert_close(gradients(), theirs, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("block_size", [256, 4096, 16384])
@pytest.mark.parametrize("name", ["dynamic", "linear"])
def test_block_wise_codes_are_nowhere_farther_than_theirs(name: str, block_size: int) -> None:
    code = functional.create_dynamic_map() if name == "dynamic" else functional.create_linear_map()
    x = torch.randn(3 * 4096 + 7)
    codes, state = functional.quantize_blockwise(x, code, blocksize=block_size)
    decoded = functional.dequantize_blockwise(codes, state)
    backend.enable()
    torch.testing.assert_close(functional.dequantize_blockwise(codes, state), decoded, rtol=0, atol=0)
    ours, our_state = functional.quantize_blockwise(x, code, blocksize=block_size)
    assert torch.equal(our_state.absmax, state.absmax)
    # Their CPU code takes the farther of two neighbours here and there; ours the nearer, up to roundings of x/s.
    away = (functional.dequantize_blockwise(ours, our_state) - x).abs()
    assert (away <= (decoded - x).abs() + 2**-20).all()


def test_the_first_step_of_an_8bit_optimizer_is_the_same() -> None:
    def step() -> Tensor:
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5120).view(64, 80))
        optimizer = bnb.optim.Adam8bit([parameter], lr=1e-2, min_8bit_size=1)
        parameter.grad = parameter.detach().cos()
        optimizer.step()
        return parameter.detach()

    theirs = step()
    backend.enable()
    assert torch.equal(step(), theirs)  # states start at zero, which every code book holds


def test_it_is_opt_in_and_undone() -> None:
    weight = torch.randn(8, 64)
    x = torch.randn(2, 64)
    codes, state = functional.quantize_4bit(weight)
    before = bnb.matmul_4bit(x, codes, state)
    assert backend.enable() == backend.enable()
    backend.disable()
    backend.disable()
    assert torch.equal(bnb.matmul_4bit(x, codes, state), before)


def test_importing_the_plug_in_does_not_import_bitsandbytes() -> None:
    code = "import sys, ferrolora.integrations.bitsandbytes; assert 'bitsandbytes' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_gives_the_same_outputs_before_and_after(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).resolve().parents[3] / "examples/bitsandbytes_backend.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--size", "128"])
    runpy.run_path(str(script), run_name="__main__")
    assert "largest difference of the outputs" in capsys.readouterr().out
