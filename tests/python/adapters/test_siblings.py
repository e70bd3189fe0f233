"""Adapter layers that read the same x are computed together, and nobody can tell but by the clock."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ferrolora as fl
from ferrolora.adapters import siblings

WIDTH = 64


class Attention(nn.Module):
    """q, k, v of one x (or k, v of another source), and o of their mixture."""

    def __init__(self) -> None:
        super().__init__()
        for name, out in (("q_proj", WIDTH), ("k_proj", 32), ("v_proj", 32), ("o_proj", WIDTH)):
            setattr(self, name, nn.Linear(WIDTH, out, bias=name == "q_proj"))

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        source = x if source is None else source
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        mixed = torch.softmax(q @ torch.cat([k, k], -1).mT / 8, -1) @ torch.cat([v, v.sin()], -1)
        return x + self.o_proj(mixed)  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, source)
        return x


def adapted(**options: object) -> fl.PeftModel:
    net = fl.quantize_model(Net())
    config = fl.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], **options)
    model = fl.get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


QKV = [tuple(f"base_model.model.blocks.{i}.{name}_proj" for name in "qkv") for i in range(2)]


def sharing(model: fl.PeftModel) -> fl.PeftModel:
    assert fl.share_inputs(model, torch.randn(1, WIDTH)) == QKV
    return model


def alone(model: fl.PeftModel) -> fl.PeftModel:
    """A copy whose layers do not know of each other."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if hasattr(module, "shared_input"):
            module.shared_input = None
    return twin


@pytest.fixture
def groups() -> Iterator[list[int]]:
    """The sizes of the groups that are computed."""
    sizes: list[int] = []
    run = siblings.linear_group_packed

    def spy(x: Tensor, members: list[siblings.Packed]) -> list[Tensor]:
        sizes.append(len(members))
        return run(x, members)

    with mock.patch.object(siblings, "linear_group_packed", spy):
        yield sizes


def gradients(model: fl.PeftModel, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_values_and_gradients_are_those_of_the_single_layers(groups: list[int], dropout: float) -> None:
    model = sharing(adapted(lora_dropout=dropout))
    twin, x = alone(model), torch.randn(2, 5, WIDTH)
    for step in range(3):
        torch.manual_seed(step)
        got = gradients(model, lambda: model(x))
        torch.manual_seed(step)
        expected = gradients(twin, lambda: twin(x))
        assert got.keys() == expected.keys()
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert groups == [3, 3] * 3  # q, k, v of each block


def test_outputs_have_the_same_bits(groups: list[int]) -> None:
    model = sharing(adapted()).eval()
    twin, x = alone(model), torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))
    assert groups == [3, 3]


def test_the_example_decides_which_layers_share(groups: list[int]) -> None:
    model = adapted().eval()
    twin, x, source = alone(model), torch.randn(5, WIDTH), torch.randn(7, WIDTH)
    names = {name.rpartition(".")[2] for group in fl.share_inputs(model, x, source) for name in group}
    assert names == {"k_proj", "v_proj"}
    assert torch.equal(model(x, source), twin(x, source))
    # The source is one tensor for both blocks, so all four are one group.
    assert groups == [4]


def test_another_source_than_in_the_example_gives_the_same_values() -> None:
    model = sharing(adapted()).eval()
    twin, x, source = alone(model), torch.randn(5, WIDTH), torch.randn(7, WIDTH)
    for other in (None, source, None):
        assert torch.equal(model(x, other), twin(x, other))


def test_a_layer_that_is_called_twice_stays_single() -> None:
    model = adapted()
    twice = nn.ModuleList([model.base_model.model, model.base_model.model])
    run = mock.Mock(side_effect=lambda x: [block(x) for block in twice])
    with mock.patch.object(model, "forward", run):
        assert fl.share_inputs(model, torch.randn(1, WIDTH)) == []


def test_the_example_leaves_modes_and_random_numbers_as_they_were() -> None:
    model = adapted(lora_dropout=0.5).train()
    model.base_model.model.blocks[0].eval()
    example = torch.randn(1, WIDTH)
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert fl.share_inputs(model, example) == QKV
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_an_example_that_does_not_fit_leaves_the_model_as_it_was() -> None:
    model = adapted().train()
    with pytest.raises(fl.ShapeError):
        fl.share_inputs(model, torch.randn(1, WIDTH + 1))
    assert model.training
    assert model(torch.randn(2, WIDTH)).shape == (2, WIDTH)


def test_a_change_between_two_siblings_calls_is_seen() -> None:
    model = sharing(adapted()).eval()
    block, x = model.base_model.model.blocks[0], torch.randn(5, WIDTH)
    for change in ("adapter", "x", "mode"):
        block.q_proj(x), block.k_proj(x), block.v_proj(x)
        block.q_proj(x)
        if change == "adapter":
            with torch.no_grad():
                block.k_proj.lora_B["default"].weight.add_(1.0)
        elif change == "x":
            x += 1.0
        with torch.set_grad_enabled(change != "mode"):
            y = block.k_proj(x)
        assert torch.equal(y, alone(model).base_model.model.blocks[0].k_proj(x)), change
        assert y.requires_grad == (change != "mode")


def test_switched_off_mixed_and_hooked_layers_keep_their_own_way() -> None:
    model = sharing(adapted()).eval()
    x = torch.randn(2, 5, WIDTH)
    twin = alone(model)
    with model.disable_adapter(), twin.disable_adapter():
        assert torch.equal(model(x), twin(x))
    for net in (model, twin):
        net.base_model.model.blocks[0].k_proj.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    assert torch.equal(model(x), twin(x))


def test_checkpointing_gives_the_same_gradients() -> None:
    model = sharing(adapted(lora_dropout=0.3))
    x = torch.randn(2, 5, WIDTH)
    torch.manual_seed(1)
    expected = gradients(model, lambda: model(x))
    torch.manual_seed(1)
    got = gradients(model, lambda: checkpoint(model, x, use_reentrant=False))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_nothing_waits_after_a_forward() -> None:
    model = sharing(adapted()).eval()
    x = torch.randn(5, WIDTH)
    y = model(x)
    watched = weakref.ref(x)
    del x, y
    gc.collect()
    assert watched() is None


def test_copies_and_pickles_share_among_themselves(groups: list[int]) -> None:
    model = sharing(adapted()).eval()
    x = torch.randn(5, WIDTH)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
    assert groups == [3, 3] * 3
    assert not any("shared_input" in key for key in model.state_dict())


def test_a_compiled_model_traces_the_single_layers(groups: list[int]) -> None:
    model = sharing(adapted()).eval()
    x = torch.randn(5, WIDTH)
    expected = model(x)
    groups.clear()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    assert not groups
