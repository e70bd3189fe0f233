"""LoraConfig: its defaults and what it refuses."""

from typing import Any

import pytest

import ferrolora as fl
from ferrolora.adapters.registry import METHODS


def test_defaults_are_those_of_the_paper_library() -> None:
    fields = fl.LoraConfig().to_dict()
    assert fields["peft_type"] == "LORA"
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"], fields["bias"]) == (8, 8, 0.0, "none")
    assert fields["megatron_core"] == "megatron.core"
    assert fields["qalora_group_size"] == 16
    assert fields["init_lora_weights"] is True
    assert all(
        fields[name] is None
        for name in ("task_type", "target_modules", "exclude_modules", "modules_to_save", "revision")
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True),
        ("loftq_config", {"loftq_bits": 4}),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", "experts.down_proj"),
        ("alora_invocation_tokens", [7]),
        ("init_lora_weights", "corda"),
        ("eva_config", {"rho": 2}),
        ("bias", "some"),
        ("r", 0),
        ("r", 2.5),
        ("r", True),
        ("lora_alpha", "16"),
        ("lora_dropout", 1.0),
        ("lora_dropout", -0.1),
        ("modules_to_save", "lm_head"),
        ("task_type", "TALKING"),
    ],
)
def test_a_value_that_is_not_supported_is_refused_by_the_name_of_its_field(field: str, value: Any) -> None:
    with pytest.raises(fl.UnsupportedError, match=rf"\b{field}\b"):
        fl.LoraConfig(**{field: value})


@pytest.mark.parametrize("patterns", [{"rank_pattern": {"q_proj": -1}}, {"alpha_pattern": {"q_proj": "2"}}])
def test_a_bad_pattern_value_is_refused_by_its_key(patterns: Any) -> None:
    with pytest.raises(fl.UnsupportedError, match="'q_proj'"):
        fl.LoraConfig(**patterns)


def test_layer_selection_needs_a_list_of_targets() -> None:
    with pytest.raises(fl.UnsupportedError, match="layers_to_transform needs a list"):
        fl.LoraConfig(target_modules="q.*", layers_to_transform=[0])
    with pytest.raises(fl.UnsupportedError, match="layers_pattern needs layers_to_transform"):
        fl.LoraConfig(target_modules=["q"], layers_pattern="layers")


def test_sets_become_sorted_lists() -> None:
    assert fl.LoraConfig(target_modules={"v", "q"}).target_modules == ["q", "v"]


def test_every_method_has_a_row_and_builds_its_own_configuration() -> None:
    assert set(METHODS) == set(fl.PeftType)
    for peft_type, method in METHODS.items():
        required = {"total_step": 3} if peft_type == "ADALORA" else {"num_virtual_tokens": 2} if method.encoder else {}
        assert method.config_class(**required).peft_type == peft_type
