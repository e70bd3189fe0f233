"""LoRA layers against plain torch."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ferrolora as fl
from ferrolora.adapters.config import pattern_value
from ferrolora.adapters.lora import LoraEmbedding, LoraLinear, wrap
from ferrolora.ops.linear import LowRank


def layer_with(adapters: dict[str, dict[str, Any]], base: nn.Module) -> Any:
    layer = wrap(base, "layer")
    for name, options in adapters.items():
        layer.add_adapter(name, fl.LoraConfig(init_lora_weights=False, **options), "layer", True)
    layer.activate(list(adapters), True)
    return layer


def delta(layer: Any, name: str, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, layer.lora_A[name].weight), layer.lora_B[name].weight) * layer.scaling[name]


def test_output_is_base_plus_scaled_low_rank_branch() -> None:
    layer = layer_with({"a": {"r": 4, "lora_alpha": 6}}, nn.Linear(8, 5))
    x = torch.randn(3, 7, 8)
    assert torch.equal(layer(x), layer.base_layer(x) + delta(layer, "a", x))
    assert layer.scaling["a"] == 6 / 4


def test_several_active_adapters_add_up() -> None:
    layer = layer_with({"a": {"r": 4}, "b": {"r": 2}}, nn.Linear(8, 5))
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), layer.base_layer(x) + delta(layer, "a", x) + delta(layer, "b", x))
    layer.activate(["b"], True)
    assert torch.equal(layer(x), layer.base_layer(x) + delta(layer, "b", x))


def test_rank_stabilised_scaling_divides_by_the_root_of_the_rank() -> None:
    assert layer_with({"a": {"r": 16, "use_rslora": True}}, nn.Linear(8, 5)).scaling["a"] == 8 / math.sqrt(16)


def test_a_new_adapter_changes_nothing_and_starts_within_the_kaiming_bound() -> None:
    layer = wrap(nn.Linear(64, 5), "layer")
    layer.add_adapter("a", fl.LoraConfig(), "layer", True)
    layer.activate(["a"], True)
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert isinstance(layer, LoraLinear)
    # Kaiming-uniform with a = sqrt(5) is U(-b, b) with b = sqrt(6 / ((1 + 5)·in)) = 1/sqrt(in) = 1/8
    assert layer.lora_A["a"].weight.abs().max() <= 1 / 8


def test_gaussian_start_has_standard_deviation_one_over_r() -> None:
    layer = wrap(nn.Linear(4096, 5), "layer")
    layer.add_adapter("a", fl.LoraConfig(r=4, init_lora_weights="gaussian"), "layer", True)
    # n = 16384 draws: the sample deviation is within 5 standard errors, 5·σ/sqrt(2n) < 0.03·σ
    assert layer.lora_A["a"].weight.std().item() == pytest.approx(1 / 4, rel=0.03)  # type: ignore[union-attr, operator]


def test_dropout_acts_in_training_only_and_keeps_the_mean() -> None:
    layer = layer_with({"a": {"r": 4, "lora_dropout": 0.5}}, nn.Linear(8, 5))
    x = torch.randn(3, 8)
    torch.manual_seed(3)
    dropped = layer.train()(x)
    torch.manual_seed(3)
    expected = layer.base_layer(x) + delta(layer, "a", F.dropout(x, 0.5))
    assert torch.equal(dropped, expected)
    assert torch.equal(layer.eval()(x), layer.base_layer(x) + delta(layer, "a", x))


def test_bias_of_b_is_scaled_and_merged() -> None:
    layer = layer_with({"a": {"r": 4, "lora_alpha": 8, "lora_bias": True}}, nn.Linear(8, 5))
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), layer.base_layer(x) + layer.lora_B["a"](layer.lora_A["a"](x)) * 2.0)
    before = layer(x)
    layer.merge(["a"])
    # one rounding of each of 8 + 4 products and sums, float32: far below 1e-5 of values of order 1
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=0)


def test_a_16_bit_base_gets_float32_adapters_and_answers_in_16_bits() -> None:
    layer = layer_with({"a": {"r": 4}}, nn.Linear(8, 5, dtype=torch.bfloat16))
    assert layer.lora_A["a"].weight.dtype == torch.float32
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_without_autocast_adapters_have_the_type_of_the_base() -> None:
    layer = wrap(nn.Linear(8, 5, dtype=torch.bfloat16), "layer")
    layer.add_adapter("a", fl.LoraConfig(), "layer", False)
    assert {p.dtype for p in layer.adapter_parameters("a")} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_merge_is_undone_bit_for_bit(dtype: torch.dtype) -> None:
    layer = layer_with({"a": {"r": 4}, "b": {"r": 2}}, nn.Linear(8, 5, dtype=dtype))
    before = layer.base_layer.weight.detach().clone()
    for _ in range(50):
        layer.merge(["a", "b"])
        assert not torch.equal(layer.base_layer.weight, before)
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_a_merge_adds_all_deltas_before_it_rounds_once() -> None:
    layer = layer_with({"a": {"r": 4}, "b": {"r": 2}}, nn.Linear(8, 5, dtype=torch.bfloat16))
    expected = layer.base_layer.weight.detach().float() + layer.delta_weight("a") + layer.delta_weight("b")
    layer.merge(["a", "b"])
    assert torch.equal(layer.base_layer.weight, expected.bfloat16())


def test_what_is_merged_cannot_be_merged_added_to_or_deleted() -> None:
    layer = layer_with({"a": {"r": 4}}, nn.Linear(8, 5))
    layer.merge(["a"])
    with pytest.raises(fl.UnsupportedError, match="merged already"):
        layer.merge(["a"])
    with pytest.raises(fl.UnsupportedError, match="unmerge_adapter"):
        layer.add_adapter("b", fl.LoraConfig(), "layer", True)
    with pytest.raises(fl.UnsupportedError, match="unmerge_adapter"):
        layer.delete_adapter("a")


def test_a_bias_of_b_cannot_be_merged_into_a_layer_without_bias() -> None:
    layer = layer_with({"a": {"r": 4, "lora_bias": True}}, nn.Linear(8, 5, bias=False))
    with pytest.raises(fl.UnsupportedError, match="without a bias"):
        layer.merge(["a"])
    assert not layer.merged


def test_embedding_adds_the_looked_up_columns() -> None:
    layer = layer_with({"a": {"r": 4, "lora_alpha": 2}}, nn.Embedding(11, 6))
    assert isinstance(layer, LoraEmbedding)
    ids = torch.tensor([[1, 10], [0, 1]])
    a, b = layer.lora_embedding_A["a"], layer.lora_embedding_B["a"]
    # 4 products and sums of values of order 1 in float32: 1e-6 is more than 4·2^-24·4
    torch.testing.assert_close(layer(ids), layer.base_layer(ids) + (b @ a).T[ids] * 0.5, atol=1e-6, rtol=0)


class FusedLinear(nn.Linear):
    """Stands for a base that computes its low-rank branch itself."""

    calls: list[LowRank]

    def forward_with_low_rank(self, x: Tensor, lora: LowRank) -> Tensor:
        self.calls.append(lora)
        return self(x) + F.linear(F.linear(x, lora.A), lora.B) * lora.scaling


def fused_linear() -> FusedLinear:
    base = FusedLinear(8, 5)
    base.calls = []
    return base


def test_one_active_adapter_over_a_base_that_offers_it_is_one_fused_call() -> None:
    layer = layer_with({"a": {"r": 4, "lora_dropout": 0.25}}, fused_linear())
    x = torch.randn(3, 8)
    assert torch.equal(layer.eval()(x), layer.base_layer(x) + delta(layer, "a", x))
    layer.train()(x)
    assert [call.dropout_p for call in layer.base_layer.calls] == [0.0, 0.25]


def test_several_active_adapters_are_stacked_into_one_fused_call() -> None:
    x = torch.randn(3, 8)
    layer = layer_with({"a": {"r": 4}, "b": {"r": 2, "lora_alpha": 3}}, fused_linear())
    expected = layer.base_layer(x) + delta(layer, "a", x) + delta(layer, "b", x)
    # the same six products of each output in another order of sums: float32 values of order 1
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
    assert [call.A.shape[0] for call in layer.base_layer.calls] == [6]


def test_adapters_with_dropout_see_other_inputs_and_take_the_plain_path() -> None:
    layer = layer_with({"a": {"r": 4, "lora_dropout": 0.5}, "b": {"r": 2}}, fused_linear()).train()
    layer(torch.randn(3, 8))
    assert layer.base_layer.calls == []


def test_disabled_adapters_leave_the_base() -> None:
    layer = layer_with({"a": {"r": 4}}, fused_linear())
    layer.adapters_enabled = False
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.base_layer.calls == []


def test_a_module_of_another_type_is_refused_with_its_path_and_type() -> None:
    with pytest.raises(fl.TargetError, match=r"block\.norm is a LayerNorm; LoRA adapts"):
        wrap(nn.LayerNorm(4), "block.norm")


def test_the_output_projection_of_multihead_attention_is_refused() -> None:
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(fl.UnsupportedError, match="without calling it"):
        wrap(attention.out_proj, "attention.out_proj")


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "keys"])
def test_a_name_that_cannot_be_a_module_or_a_folder_is_refused(name: str) -> None:
    with pytest.raises(fl.TargetError, match="cannot name an adapter"):
        wrap(nn.Linear(4, 4), "layer").add_adapter(name, fl.LoraConfig(), "layer", True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("q_proj", 1),
        ("model.layers.0.q_proj", 1),
        ("model.layers.0.my_q_proj", 9),
        ("model.layers.3.v_proj", 2),
        ("model.layers.3.v_proj.inner", 9),
    ],
)
def test_a_pattern_matches_a_whole_name_or_a_suffix(path: str, value: int) -> None:
    assert pattern_value({"q_proj": 1, r"layers\.\d.v_proj": 2}, path, 9) == value
