"""Which modules a configuration means."""

from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

import ferrolora as fl
from ferrolora.model.targets import find_targets, matches, saved_modules, smallest_suffixes
from tiny import models

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def targets(model: nn.Module, saved: Sequence[str] = (), **options: Any) -> list[str]:
    return find_targets(model, fl.LoraConfig(**options), saved)


@pytest.mark.parametrize(
    ("names", "path", "expected"),
    [
        (["q_proj"], "layers.0.q_proj", True),
        (["q_proj"], "q_proj", True),
        (["q_proj"], "layers.0.my_q_proj", False),
        (["0.q_proj"], "layers.0.q_proj", True),
        ("q_proj", "layers.0.q_proj", False),
        (r".*\.(q|v)_proj", "layers.0.v_proj", True),
        (r".*\.(q|v)_proj", "layers.0.v_proj.inner", False),
    ],
)
def test_a_string_matches_whole_names_and_a_list_matches_suffixes(
    names: str | list[str], path: str, expected: bool
) -> None:
    assert matches(names, path) is expected


@pytest.mark.parametrize("target", [None, "all-linear"])
def test_no_target_means_every_linear_but_the_head(target: str | None) -> None:
    found = targets(models.llama(), target_modules=target)
    assert {path.rpartition(".")[2] for path in found} == LINEARS
    assert len(found) == 14


def test_no_target_leaves_the_head_of_a_classifier_alone() -> None:
    found = targets(models.bert_classifier())
    assert "bert.pooler.dense" in found
    assert "classifier" not in found


def test_no_target_finds_conv1d() -> None:
    assert {path.rpartition(".")[2] for path in targets(models.gpt2())} == {"c_attn", "c_proj", "c_fc"}


def test_layers_are_chosen_by_their_first_index() -> None:
    found = targets(models.llama(), target_modules=["q_proj"], layers_to_transform=[1])
    assert found == ["model.layers.1.self_attn.q_proj"]
    assert targets(models.llama(), layers_to_transform=1, layers_pattern="layers", target_modules=["q_proj"]) == found


def test_excluded_and_saved_modules_get_no_adapter() -> None:
    found = targets(
        models.llama(),
        target_modules=["q_proj", "v_proj"],
        exclude_modules=r".*layers\.0\..*",
        saved=["model.layers.1.self_attn.v_proj"],
    )
    assert found == ["model.layers.1.self_attn.q_proj"]


def test_nothing_matched_lists_the_nearest_names() -> None:
    with pytest.raises(fl.TargetError, match=r"\['qproj'\] matched no module.*nearest names are: .*q_proj"):
        targets(models.llama(), target_modules=["qproj"])


def test_nothing_matched_names_the_limits_that_were_set() -> None:
    with pytest.raises(fl.TargetError, match=r"with \{'layers_to_transform': \[9\]\}"):
        targets(models.llama(), target_modules=["q_proj"], layers_to_transform=[9])


def test_saved_modules_match_the_end_of_a_name_as_in_peft() -> None:
    model = nn.ModuleDict({"pre_classifier": nn.Linear(2, 2), "classifier": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    assert saved_modules(model, ["classifier"]) == ["pre_classifier", "classifier"]
    assert saved_modules(model, None) == []


def test_the_smallest_suffixes_mean_exactly_the_chosen_modules() -> None:
    model = models.bert_classifier()
    names = [path for path, _ in model.named_modules() if path]
    for chosen in (
        [path for path in names if path.endswith(".query")],
        [path for path in names if path.endswith("attention.output.dense")],
        ["bert.encoder.layer.1.attention.self.value", "bert.pooler.dense"],
    ):
        suffixes = smallest_suffixes(model, chosen)
        assert [path for path in names if matches(suffixes, path)] == chosen
    assert smallest_suffixes(model, [path for path in names if path.endswith(".query")]) == ["query"]
