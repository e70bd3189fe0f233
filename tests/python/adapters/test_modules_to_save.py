"""Modules that are trained in full."""

import pytest
import torch
from torch import nn

import ferrolora as fl
from ferrolora.adapters.modules_to_save import ModulesToSaveWrapper


def wrapper() -> ModulesToSaveWrapper:
    made = ModulesToSaveWrapper(nn.Linear(4, 3), "head")
    made.add_adapter("a")
    made.activate(["a"], True)
    return made


def test_the_copy_is_trained_and_the_original_stays() -> None:
    head = wrapper()
    x = torch.randn(2, 4)
    assert torch.equal(head(x), head.original_module(x))
    with torch.no_grad():
        head.weight.add_(1)
    assert not torch.equal(head(x), head.original_module(x))
    assert [name for name, p in head.named_parameters() if p.requires_grad] == [
        "modules_to_save.a.weight",
        "modules_to_save.a.bias",
    ]


def test_without_an_active_or_enabled_adapter_the_original_answers() -> None:
    head = wrapper()
    head.adapters_enabled = False
    assert head.active_module is head.original_module
    head.adapters_enabled = True
    head.activate([], True)
    assert head.active_module is head.original_module


def test_other_attributes_are_those_of_the_module_in_use() -> None:
    head = wrapper()
    assert head.weight is head.modules_to_save["a"].weight
    assert head.out_features == 3
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = head.nothing_like_it


def test_two_adapters_with_a_copy_each_cannot_both_be_active() -> None:
    head = wrapper()
    head.add_adapter("b")
    with pytest.raises(fl.UnsupportedError, match="only one can be active"):
        head.activate(["a", "b"], True)


def test_a_quantized_module_is_refused_with_the_mend() -> None:
    packed = nn.Linear(4, 3)
    packed.weight = nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(fl.UnsupportedError, match="skip_modules"):
        ModulesToSaveWrapper(packed, "head")
