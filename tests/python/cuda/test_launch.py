"""Preparing, lending memory and choosing devices, without a GPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ferrolora as fl
from ferrolora.cuda import crossover, launch, workspace
from ferrolora.ops.checks import require_device
from ferrolora.ops.finite import finite_flag

NO_GPU = not torch.cuda.is_available()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Workspaces on the CPU; `capturing` says whether a graph is being captured."""
    state = {"capturing": False}
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(workspace, "_held", {})
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *shape, device=None, make=make, **rest: make(*shape, **rest))
    return state


def test_a_stream_has_one_workspace_as_large_as_its_largest_layer(on_cpu: dict[str, bool]) -> None:
    large = workspace.weight((8, 16), torch.float32, 0, 1)
    small = workspace.weight((4, 4), torch.bfloat16, 0, 1)
    assert small.data_ptr() == large.data_ptr()
    assert small.shape == (4, 4)
    assert workspace.weight((4, 4), torch.float32, 0, 2).data_ptr() != large.data_ptr()
    assert workspace.weight((4, 4), torch.float32, 1, 1).data_ptr() != large.data_ptr()
    assert fl.cuda.free_workspaces() == 8 * 16 * 4 + 2 * 4 * 4 * 4
    assert fl.cuda.free_workspaces() == 0


def test_scratch_and_the_decoded_weight_are_apart(on_cpu: dict[str, bool]) -> None:
    assert workspace.scratch(64, 0, 1).data_ptr() != workspace.weight((4, 4), torch.float32, 0, 1).data_ptr()


def test_counters_are_zero_when_first_lent_and_kept(on_cpu: dict[str, bool]) -> None:
    words = workspace.counters(100, 0, 1)
    assert not words.any()
    assert workspace.counters(50, 0, 1) is words


def test_a_captured_graph_has_memory_of_its_own(on_cpu: dict[str, bool]) -> None:
    shared = workspace.weight((4, 4), torch.float32, 0, 1)
    on_cpu["capturing"] = True
    own = workspace.weight((4, 4), torch.float32, 0, 1)
    assert own.data_ptr() != shared.data_ptr()
    assert own.data_ptr() != workspace.weight((4, 4), torch.float32, 0, 1).data_ptr()


def test_quantizing_under_capture_says_what_to_do(on_cpu: dict[str, bool]) -> None:
    on_cpu["capturing"] = True
    with pytest.raises(fl.CudaError, match="quantize before the capture"):
        finite_flag(torch.ones(3))


def test_a_launch_lends_what_the_kernel_asks_for(on_cpu: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Launch:
        scratch_bytes, counters = 256, 0

        def __call__(self, *args: Any) -> None:
            calls.append(args)

    monkeypatch.setattr("torch._C._cuda_getCurrentRawStream", lambda index: 40 + index)
    given: launch.Given = {"x": torch.ones(3)}
    launch.run(Launch(), 2, given)  # type: ignore[arg-type]
    ((stream, scratch, counters, passed),) = calls
    assert (stream, counters) == (42, None)
    assert scratch.nbytes >= 256
    assert passed is given


def test_a_tensor_within_another_is_made_ready() -> None:
    base = torch.arange(40, dtype=torch.float16)
    assert launch.ready(base).data_ptr() == base.data_ptr()
    for view in (base[1:9], base[::2], base.view(5, 8).t()):
        assert launch.ready(view).data_ptr() % 16 == 0
        assert launch.ready(view).is_contiguous()
        assert torch.equal(launch.ready(view), view)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_driver_preparing_a_launch_names_the_library() -> None:
    with pytest.raises(fl.CudaError, match=r"no NVIDIA driver: libcuda.so.1 cannot be loaded"):
        launch.prepare(0, "linear", torch.float16, 64, 64, 1)


def test_tensors_on_two_devices_are_refused_with_both_named() -> None:
    cpu = torch.ones(2, 64)
    with FakeTensorMode():
        gpu = torch.empty(2, 64, device="cuda:1")
        other = torch.empty(2, 64, device="cuda:0")
    require_device("linear", gpu, ("nf4", 64), weight=gpu)
    with pytest.raises(fl.UnsupportedError, match=r"linear: the weight is on cpu and the input on cuda:1.*nf4"):
        require_device("linear", gpu, ("nf4", 64), weight=cpu)
    with pytest.raises(fl.UnsupportedError, match="the weight is on cuda:1 and the input on cpu"):
        require_device("linear", cpu, ("nf4", 64), weight=gpu)
    with pytest.raises(fl.UnsupportedError, match="the bias is on cuda:0 and the input on cuda:1"):
        require_device("linear", gpu, ("nf4", 64), bias=other)


def test_shapes_on_a_gpu_are_those_of_the_cpu() -> None:
    with FakeTensorMode():
        w = torch.empty(48, 64, device="cuda", dtype=torch.bfloat16)
        qt = fl.quantize(w)
        x = torch.empty(3, 5, 64, device="cuda", dtype=torch.bfloat16)
        lora = fl.LowRank(torch.empty(4, 64, device="cuda"), torch.empty(48, 4, device="cuda"), 0.5, 0.1)
        y = fl.linear(x, qt, lora=lora)
        back = qt.dequantize()
    assert (y.shape, y.dtype, y.device.type) == ((3, 5, 48), torch.bfloat16, "cuda")
    assert (back.shape, back.device.type) == ((48, 64), "cuda")
    assert qt.codes.device.type == "cuda"


def test_a_measured_crossover_is_kept_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "GPU A" if index == 0 else "GPU B")
    crossover._table.cache_clear()
    crossover.tuned_rows.cache_clear()
    assert crossover.tuned_rows(0) is None
    file = crossover.record("GPU A", 48)
    crossover._table.cache_clear()
    crossover.tuned_rows.cache_clear()
    assert (crossover.tuned_rows(0), crossover.tuned_rows(1)) == (48, None)
    for broken in ("{", json.dumps({"GPU A": "many"})):
        file.write_text(broken)
        crossover._table.cache_clear()
        crossover.tuned_rows.cache_clear()
        with pytest.raises(fl.FormatError, match=r"crossover.json.*ferrolora bench --tune"):
            crossover.tuned_rows(0)
    crossover._table.cache_clear()
    crossover.tuned_rows.cache_clear()


@pytest.mark.slow
def test_importing_loads_no_compiler_and_opens_no_driver() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import ferrolora, ferrolora.cuda.launch; "
        "new = [m for m in set(sys.modules) - before if m.startswith('cuda')]; "
        "print(new, 'libcuda.so' in open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
