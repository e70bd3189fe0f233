"""`ferrolora doctor` on a machine with or without a GPU."""

import json
from importlib.metadata import version
from typing import Any

import pytest
import torch

from ferrolora import CudaError, _native
from ferrolora.cuda import device, jit


def test_it_says_what_is_here(cli) -> None:
    done = cli("doctor")
    assert done.status == 0
    for words in (f"torch {version('torch')}", _native.isa(), "driver", "nvrtc", "cache"):
        assert words in done.out


def test_json_has_every_part(cli) -> None:
    content = json.loads(cli("doctor", "--json").out)
    assert set(content) == {"ferrolora", "python", "cpu", "versions", "gpu", "compiler", "missing"}
    assert content["cpu"]["in_use"] in content["cpu"]["instruction_sets"]
    assert content["versions"]["torch"] == version("torch")
    assert content["compiler"]["cache"].endswith("ferrolora/cubin")


def test_no_gpu_is_nothing_missing(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> dict[str, Any]:
        raise CudaError("no NVIDIA driver: libcuda.so.1 cannot be loaded")

    monkeypatch.setattr(_native, "cuda_driver", no_driver)
    content = json.loads(cli("doctor", "--json").out)
    assert content["gpu"]["driver"] is None
    assert content["gpu"]["missing"] == ["no NVIDIA driver: libcuda.so.1 cannot be loaded"]
    assert content["missing"] == []


def gpu(sm: int) -> dict[str, Any]:
    known = sm in _native.cuda_architectures()
    return {"name": "GPU", "sm": sm, "multiprocessors": 8, "shared_per_block": 101_376, "kernels": known}


@pytest.mark.parametrize(
    ("devices", "built_for", "sees", "words"),
    [
        ([], "13.2", False, "CUDA_VISIBLE_DEVICES"),
        ([gpu(61)], "13.2", True, "its compute capability 6.1 is not one of 7.5, 8.0"),
        ([gpu(90)], None, False, "was built without CUDA"),
        ([gpu(90)], "13.2", False, "update the driver"),
    ],
)
def test_each_obstacle_comes_with_its_mend(
    cli, monkeypatch: pytest.MonkeyPatch, devices: list[Any], built_for: str | None, sees: bool, words: str
) -> None:
    monkeypatch.setattr(_native, "cuda_driver", lambda: {"version": "12.4", "devices": devices})
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)
    assert any(words in sentence for sentence in json.loads(cli("doctor", "--json").out)["missing"])
    assert words in cli("doctor").out


def test_a_gpu_without_a_compiler_is_told_the_extra(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_driver", lambda: {"version": "13.2", "devices": [gpu(90)]})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def absent() -> str:
        raise CudaError(f"compiling the CUDA kernels needs NVRTC; pip install '{jit.extra()}'")

    monkeypatch.setattr(jit, "nvrtc_version", absent)
    missing = json.loads(cli("doctor", "--json").out)["missing"]
    assert missing == [f"compiling the CUDA kernels needs NVRTC; pip install '{jit.extra()}'"]
    assert "compute capability 9.0, 8 multiprocessors" in cli("doctor").out


def test_capabilities_are_written_as_people_do() -> None:
    assert [device.dotted(sm) for sm in (75, 100, 121)] == ["7.5", "10.0", "12.1"]
