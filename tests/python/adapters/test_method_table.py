"""Every method over every kind of base: gradients, training, files in both directions, merging. Prints a table.

python -m pytest tests/python/adapters/test_method_table.py
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import ferrolora as fl
from ferrolora.adapters.base import dense_linear
from ferrolora.model.inject import replace_module
from ferrolora.model.merge import packed_linears
from tables.methods import cell
from tiny import models
from tiny.methods import CASES, Case, base_of, float_weights, perturb
from tiny.text import questions

# What PEFT and transformers themselves warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

# The same numbers summed in another order (fused, stacked, as a Khatri-Rao product): logits of order 1 from sums of up
# to 48 float32 products in two layers. On a float base LoRA is the same calls in the same order, and differs by 0.
OTHER_ORDER = {"atol": 1e-6, "rtol": 0.0}
EXACT_ON_FLOAT = ("LoRA", "rsLoRA", "LoRA with token rows", "PiSSA", "OLoRA", "IA3", "Prompt tuning", "Prefix tuning")


class World:
    """A base in float, the same base as it is stored, and what a method needs to start over it."""

    def __init__(self, case: Case, kind: str) -> None:
        torch.manual_seed(0)
        self.case, self.kind = case, kind
        self.dense = case.maker()
        torch.manual_seed(0)
        self.stored = base_of(kind, case.maker)
        self.weights = float_weights(self.dense)

    def adapted(self) -> fl.PeftModel:
        model = fl.get_peft_model(copy.deepcopy(self.stored), self.case.ours(), float_weights=self.weights)
        perturb(model)
        return model.eval()

    def load(self, directory: Path) -> fl.PeftModel:
        return fl.PeftModel.from_pretrained(copy.deepcopy(self.stored), directory, float_weights=self.weights)

    def compare(self, name: str, left: nn.Module, right: nn.Module) -> None:
        answers = models.logits(left, **self.case.inputs), models.logits(right, **self.case.inputs)
        if self.kind == "float32" and name in EXACT_ON_FLOAT:
            assert torch.equal(*answers)
        else:
            torch.testing.assert_close(*answers, **OTHER_ORDER)


def gradients(name: str, world: World, directory: Path) -> None:
    """Gradients equal those over the dequantized weight, which test_gradients.py holds to float64."""
    model = world.adapted().train()
    model.save_pretrained(directory)
    twin = copy.deepcopy(model)
    for layer in packed_linears(twin):
        replace_module(twin, layer, dense_linear(layer, torch.float32))
    grads = []
    for each in (model, twin):
        torch.manual_seed(1)  # AdaMix picks its copies at random
        each(input_ids=models.token_ids(), labels=models.token_ids(), **world.case.inputs).loss.backward()
        grads.append({key: p.grad for key, p in each.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        assert grad is not None, key
        # float32 sums of 12 rows in another order
        torch.testing.assert_close(grad, grads[1][key], atol=1e-5, rtol=1e-4, msg=lambda text, k=key: f"{k}: {text}")
    assert any(bool(grad.abs().max() > 0) for grad in grads[0].values())


def trains(name: str, world: World, directory: Path) -> None:
    """The loss on eight questions of TREC falls by more than a twentieth in 15 steps; the base keeps its bytes."""
    case = copy.deepcopy(world.case)
    if "total_step" in case.options:
        case.options["total_step"] = 15
    base = copy.deepcopy(world.stored)
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(10)  # type: ignore[operator]  # logits that adapters can move
    model = fl.get_peft_model(base, case.ours(), float_weights=world.weights)
    ids = questions()
    rows = {key: value.repeat(len(ids) // len(value)) for key, value in case.inputs.items()}
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}

    def loss() -> float:
        with torch.no_grad():
            return model.eval()(input_ids=ids, labels=ids, **rows).loss.item()  # type: ignore[no-any-return]

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=8e-2)
    before = loss()
    for step in range(15):
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids, **rows).loss.backward()
        optimizer.step()
        model.update_and_allocate(step + 1)
    assert loss() < 0.95 * before
    now = dict(model.named_parameters())
    assert all(torch.equal(now[key], value) for key, value in frozen.items())


def saves(name: str, world: World, directory: Path) -> None:
    """A file comes back with the same logits, bit for bit."""
    model = world.adapted()
    model.save_pretrained(directory)
    again = world.load(directory)
    answer = models.logits(model, **world.case.inputs)
    assert torch.equal(models.logits(again, **world.case.inputs), answer)
    assert not torch.equal(answer[:, -6:], models.logits(world.stored))


def into_peft(name: str, world: World, directory: Path) -> None:
    """PEFT reads our file and gives the same logits over the same base."""
    model = world.adapted()
    model.save_pretrained(directory)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(world.stored), directory)
    world.compare(name, model, theirs)


def from_peft(name: str, world: World, directory: Path) -> None:
    """We read PEFT's file and give the same logits over the same base."""
    options = copy.deepcopy(world.case.options)
    theirs = peft.get_peft_model(copy.deepcopy(world.stored), getattr(peft, world.case.config)(**options))
    perturb(theirs)
    theirs.save_pretrained(directory)
    world.compare(name, world.load(directory), theirs.eval())


def merges(name: str, world: World, directory: Path) -> None:
    """Merged in place and merged for good, the logits stay; 100 merges later the base has its bytes."""
    model = world.adapted()
    before = models.logits(model)
    frozen = {key: p.clone() for key, p in model.get_base_model().named_parameters()}
    for _ in range(100):
        model.merge_adapter()
        model.unmerge_adapter()
    now = dict(model.get_base_model().named_parameters())
    assert all(torch.equal(now[key], value) for key, value in frozen.items())
    model.merge_adapter()
    torch.testing.assert_close(models.logits(model), before, **OTHER_ORDER)
    merged = model.merge_and_unload(dtype=torch.float32)
    torch.testing.assert_close(models.logits(merged), before, **OTHER_ORDER)


CHECKS: dict[str, Callable[[str, World, Path], None]] = {
    "gradients": gradients,
    "trains": trains,
    "reloads": saves,
    "into PEFT": into_peft,
    "from PEFT": from_peft,
    "merges": merges,
}


@pytest.mark.parametrize("kind", ["float32", "nf4+dq", "int8"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_cell(check: str, name: str, kind: str, tmp_path: Path, record_property: Any) -> None:
    case = CASES[name]
    reason = case.reason(check, kind)
    record_property(*cell(name, kind, check, reason))
    if reason is None:
        CHECKS[check](name, World(case, kind), tmp_path)
