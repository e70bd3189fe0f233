"""Compiling without a GPU: NVRTC needs none."""

import sys
from pathlib import Path

import pytest
import torch

from ferrolora import CudaError, UnsupportedError, _native
from ferrolora.cuda import jit
from ferrolora.cuda.launch import problem

SMALL = ("quantize.cu", {"FL_TYPE": "half"})  # compiles in a fraction of a second


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jit._compiler.cache_clear()
    return tmp_path / "ferrolora" / "cubin" / "entries"


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_a_kernel_compiles_for_an_architecture_that_is_not_here() -> None:
    for sm in (75, 90, 120):
        assert jit.cubin(*SMALL, sm)[:4] == b"\x7fELF"


def test_the_second_call_reads_what_the_first_wrote(own_cache: Path) -> None:
    jit.cubin(*SMALL, 90)
    (entry,) = entries(own_cache)
    entry.write_bytes(b"kept")
    assert jit.cubin(*SMALL, 90) == b"kept"


def test_another_constant_architecture_or_source_is_another_entry(own_cache: Path) -> None:
    jit.cubin(*SMALL, 90)
    jit.cubin(*SMALL, 80)
    jit.cubin("quantize.cu", {"FL_TYPE": "float"}, 90)
    plan = _native.cuda_plan(problem("dequantize", dtype="float16", quant_type="int8", n=4, k=4), 90)
    assert plan is not None
    jit.cubin(plan["file"], plan["constants"], 90)
    assert len(entries(own_cache)) == 4
    assert jit.describe()["cached"] == 4


def test_what_does_not_compile_is_an_error_with_its_constants_and_the_compilers_log() -> None:
    with pytest.raises(CudaError, match=r"NVRTC [\d.]+ cannot compile .* for sm_90 with FL_TYPE=quarter: ") as e:
        jit.cubin("quantize.cu", {"FL_TYPE": "quarter"}, 90)
    assert "quarter" in str(e.value).partition(": ")[2]
    with pytest.raises(CudaError, match="for sm_61"):
        jit.cubin(*SMALL, 61)
    with pytest.raises(UnsupportedError, match=r"source must be one of dequantize.cu.*got \"gemm.cu\""):
        jit.cubin("gemm.cu", {"FL_TYPE": "half"}, 90)


def test_a_missing_compiler_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.core", None)
        with pytest.raises(CudaError, match=r"needs the package cuda-core .*pip install 'ferrolora\[cuda12\]'"):
            jit.cubin(*SMALL, 90)

    def nowhere(name: str) -> None:
        raise RuntimeError(f"lib{name} is nowhere")

    monkeypatch.setattr("cuda.pathfinder.load_nvidia_dynamic_lib", nowhere)
    with pytest.raises(CudaError, match=r"needs NVRTC, which was not found; pip install 'ferrolora\[cuda12\]'"):
        jit.cubin(*SMALL, 90)
    assert jit.describe()["nvrtc"] is None
    assert "NVRTC" in jit.describe()["missing"][0]


def test_the_extra_is_that_of_torchs_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, extra in (("12.4", "cuda12"), ("13.2", "cuda13"), (None, "cuda13")):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert jit.extra() == f"ferrolora[{extra}]"
