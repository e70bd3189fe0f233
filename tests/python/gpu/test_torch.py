"""Streams, CUDA graphs, torch.compile, autocast and several devices."""

import pytest
import torch

import ferrolora as fl
from tiny.products import weight


def problem(
    m: int = 5, n: int = 256, k: int = 512, device: str = "cuda"
) -> tuple[torch.Tensor, fl.QuantTensor, fl.LowRank]:
    x = torch.randn(m, k, dtype=torch.float16, device=device)
    a, b = torch.randn(8, k, device=device), torch.randn(n, 8, device=device)
    return x, weight(n, k).to(device), fl.LowRank(a, b, 0.5)


def test_a_linear_runs_on_the_current_stream() -> None:
    x, qt, lora = problem()
    right = fl.linear(x, qt, lora=lora)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what follows on this stream sees late filled; another stream would not
        late.copy_(x)
        y = fl.linear(late, qt, lora=lora)
    stream.synchronize()
    assert torch.equal(y, right)


@pytest.mark.parametrize("m", [1, 20, 500])
def test_a_captured_graph_replays_on_new_inputs(m: int) -> None:
    x, qt, lora = problem(m)
    static = x.clone()
    fl.linear(static, qt, lora=lora)  # compiles and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fl.linear(static, qt, lora=lora)
    for _ in range(3):
        static.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, fl.linear(static, qt, lora=lora))


def test_a_larger_layer_after_the_capture_leaves_the_graph_its_memory() -> None:
    x, qt, lora = problem(500)
    fl.linear(x, qt, lora=lora)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fl.linear(x, qt, lora=lora)
    graph.replay()
    right = y.clone()
    large_x, large, large_lora = problem(500, 2048, 2048)
    fl.linear(large_x, large, lora=large_lora)
    fl.cuda.free_workspaces()
    graph.replay()
    assert torch.equal(y, right)


def test_each_replay_of_a_graph_drops_other_elements() -> None:
    x, qt, lora = problem()
    dropped = lora._replace(dropout_p=0.5)
    fl.linear(x, qt, lora=dropped)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fl.linear(x, qt, lora=dropped)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(y, first)


def test_capturing_before_a_kernel_is_loaded_says_what_to_do() -> None:
    x, qt, _ = problem(3, 176, 320)  # a shape of no other test
    lora = fl.LowRank(torch.randn(13, 320, device="cuda"), torch.randn(176, 13, device="cuda"), 1.0)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(fl.CudaError, match=r"call the operator once .* before the capture"), torch.cuda.graph(graph):
        fl.linear(x, qt, lora=lora)


@pytest.mark.parametrize("m", [4, 300])
def test_a_compiled_step_gives_the_gradients_of_eager(m: int) -> None:
    x, qt, lora = problem(m)

    def step(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return fl.linear(x, qt, lora=fl.LowRank(a, b, 0.5)).float().square().mean()

    found = []
    for run in (step, torch.compile(step, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, lora.A, lora.B)]
        run(*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


def test_autocast_casts_x() -> None:
    _, qt, lora = problem()
    with torch.autocast("cuda", torch.bfloat16):
        assert fl.linear(torch.randn(3, 512, device="cuda"), qt, lora=lora).dtype == torch.bfloat16


def test_slices_and_strides_are_taken() -> None:
    x, qt, lora = problem(8)
    for view in (x[1:4], torch.randn(512, 6, device="cuda", dtype=torch.float16).t(), x.view(2, 4, 512)[:, ::2]):
        assert torch.equal(fl.linear(view, qt, lora=lora), fl.linear(view.clone().contiguous(), qt, lora=lora))
    base = torch.randn(3 * 512 + 1, device="cuda", dtype=torch.float16)
    shifted = base[1:].view(3, 512)  # begins at no multiple of 16 bytes
    assert torch.equal(fl.linear(shifted, qt), fl.linear(shifted.clone(), qt))


def test_a_group_is_its_linears() -> None:
    from ferrolora.ops.linear_group import Sibling, linear_group

    x, qt, lora = problem()
    other = weight(64, 512).to("cuda")
    found = linear_group(x, [Sibling(qt, None, lora), Sibling(other)])
    assert torch.equal(found[0], fl.linear(x, qt, lora=lora))
    assert torch.equal(found[1], fl.linear(x, other))


def test_the_device_is_that_of_the_tensor() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    x, qt, lora = problem(device="cuda:1")
    with torch.cuda.device(0):
        y = fl.linear(x, qt, lora=lora)
    assert y.device == torch.device("cuda:1")
    near = fl.LowRank(lora.A.to("cuda:0"), lora.B.to("cuda:0"), lora.scaling)
    assert torch.equal(y.cpu(), fl.linear(x.to("cuda:0"), qt.to("cuda:0"), lora=near).cpu())
    with pytest.raises(fl.UnsupportedError, match="the weight is on cuda:1 and the input on cuda:0"):
        fl.linear(x.to("cuda:0"), qt)


def test_a_layer_and_an_adapter_train() -> None:
    layer = fl.nn.QuantLinear.from_linear(torch.nn.Linear(256, 128).cuda())
    a = torch.randn(8, 256, device="cuda", requires_grad=True)
    b = torch.zeros(128, 8, device="cuda", requires_grad=True)
    x, target = torch.randn(64, 256, device="cuda"), torch.randn(64, 128, device="cuda")
    optimizer = torch.optim.Adam([a, b], lr=1e-2)
    losses = []
    for _ in range(50):
        loss = (layer.forward_with_low_rank(x, fl.LowRank(a, b, 1.0)) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
