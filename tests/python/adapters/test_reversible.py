"""MEFT: gradients of the recomputed layers, the memory they save, the drift they are refused for."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import ferrolora as fl
from ferrolora.adapters.reversible import ReversibleStack
from tiny import models
from tiny.methods import base_of, perturb
from tiny.text import questions

IDS = models.token_ids()


def adapted(base: Any = None, **options: Any) -> fl.PeftModel:
    model = fl.get_peft_model(base or models.llama(), fl.ReversibleConfig(**({"r": 8, "max_drift": 1e-3} | options)))
    perturb(model)
    return model


def stack(model: fl.PeftModel) -> ReversibleStack:
    return next(module for module in model.modules() if isinstance(module, ReversibleStack))


def gradients(model: fl.PeftModel, kept: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    stack(model).training = not kept  # in evaluation mode the stack keeps its activations
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["float32", "nf4+dq", "int8"])
def test_gradients_equal_those_with_stored_activations(kind: str) -> None:
    model = adapted(base_of(kind))
    recomputed, stored = gradients(model, kept=False), gradients(model, kept=True)
    assert recomputed.keys() == stored.keys()
    assert len(recomputed) == 2
    drift = stack(model).drift
    assert drift is not None
    assert drift < 1e-4
    for name, grad in stored.items():
        # the activations are off by the drift, and the gradients of two layers by a small multiple of it
        assert (recomputed[name] - grad).norm() < 100 * max(drift, 1e-6) * grad.norm(), name


def saved_bytes(model: fl.PeftModel) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 64, (8, 32))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return sum(sizes.values())


def test_memory_for_activations_does_not_grow_with_the_layers() -> None:
    kept, recomputed = [], []
    for layers in (2, 8):
        model = adapted(models.llama(num_hidden_layers=layers)).train()
        recomputed.append(saved_bytes(model))
        stack(model).training = False
        kept.append(saved_bytes(model))
    # six more layers keep nothing but their bottlenecks' parameters: 6 layers x 2 matrices of 8 x 32 float32
    assert recomputed[1] - recomputed[0] <= 6 * 2 * 8 * 32 * 4
    assert kept[1] > 2.5 * kept[0]
    assert recomputed[1] < kept[1] / 4


def test_it_starts_as_the_two_streams_without_bottlenecks_and_trains() -> None:
    base = models.llama()
    with torch.no_grad():
        base.lm_head.weight.mul_(10)
    model, ids = fl.get_peft_model(base, fl.ReversibleConfig(r=8)), questions()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_too_much_drift_is_refused_with_its_size() -> None:
    model = adapted(models.llama(num_hidden_layers=12), scale_lambda=0.01, max_drift=1e-4).train()
    with pytest.raises(fl.UnsupportedError, match=r"12 layers is off by .* more than max_drift=1.0e-04"):
        model(input_ids=IDS, labels=IDS).loss.backward()


def test_files_come_back_with_the_same_logits(tmp_path: Path) -> None:
    base = models.llama()
    model = adapted(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    again = fl.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(models.logits(again), models.logits(model))
    assert set(fl.get_peft_model_state_dict(model)) == {
        "base_model.model.model.layers.0.reversible_down",
        "base_model.model.model.layers.0.reversible_up",
    }


def test_disabled_or_unloaded_it_is_the_base() -> None:
    base = models.llama()
    expected = models.logits(base)
    model = adapted(base)
    with model.disable_adapter():
        assert torch.equal(models.logits(model), expected)
    assert not torch.equal(models.logits(model), expected)
    restored = model.unload()
    assert torch.equal(models.logits(restored), expected)
    assert len(restored.model.layers) == 2


def test_it_generates_with_a_cache() -> None:
    model = adapted().eval()
    answer = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, pad_token_id=0)
    for position in range(6, answer.shape[1]):
        assert torch.equal(model(input_ids=answer[:, :position]).logits[:, -1].argmax(-1), answer[:, position])


def test_no_weight_can_hold_it() -> None:
    with pytest.raises(fl.UnsupportedError, match="no weight can hold it"):
        adapted().merge_adapter()
    with pytest.raises(fl.UnsupportedError, match=r"both scales in \(0, 1\]"):
        fl.ReversibleConfig(scale_lambda=0.0)
