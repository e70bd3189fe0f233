"""Several adapters in one model: a different one for each row of a batch, combinations, exchange in place."""

from pathlib import Path
from typing import Any

import pytest
import torch

import ferrolora as fl
from tiny import models
from tiny.methods import CASES, base_of, perturb
from tiny.models import logits

IDS = torch.arange(24).view(4, 6)


def two(base: Any = None, **options: Any) -> fl.PeftModel:
    model = fl.get_peft_model(base or models.llama(), fl.LoraConfig(target_modules=["q_proj", "v_proj"], **options))
    model.add_adapter("b", fl.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, **options))
    model.set_adapter(["default", "b"] if not options.get("modules_to_save") else "b")
    perturb(model)
    model.set_adapter("default")
    return model.eval()


@pytest.mark.parametrize("kind", ["float32", "nf4+dq"])
def test_each_row_of_a_batch_uses_its_own_adapter(kind: str) -> None:
    model = two(base_of(kind), modules_to_save=["lm_head"])
    names = ["b", "default", "__base__", "b"]
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(input_ids=IDS[row : row + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(input_ids=IDS[row : row + 1]).logits
            # float32 sums of 48 products in another order
            torch.testing.assert_close(mixed[row], alone[0], atol=1e-6, rtol=0)


def test_generation_with_beams_keeps_each_rows_adapter() -> None:
    model = two()
    names = ["b", "default", "__base__", "b"]
    options = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    mixed = model.generate(IDS, attention_mask=mask, adapter_names=names, **options)
    for row, name in enumerate(names):
        alone = model.generate(IDS[row : row + 1], attention_mask=mask[:1], adapter_names=[name], **options)
        assert torch.equal(mixed[row], alone[0])
    assert all(layer.row_groups is None for layer in model.modules() if hasattr(layer, "row_groups"))


def test_gradients_of_a_mixed_batch_go_to_the_adapters_of_its_rows() -> None:
    model = two()
    model.set_adapter(["default", "b"])
    model.train()(input_ids=IDS[:2], labels=IDS[:2], adapter_names=["b", "__base__"]).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is None for name, grad in grads.items() if "default" in name)
    assert all(grad is not None for name, grad in grads.items() if ".b." in name)


def test_an_unknown_or_merged_adapter_in_a_batch_is_refused() -> None:
    model = two()
    with pytest.raises(fl.TargetError, match="no adapter 'nobody'"):
        model(input_ids=IDS, adapter_names=["nobody"] * 4)
    model.merge_adapter()
    with pytest.raises(fl.UnsupportedError, match="mixing adapters"):
        model(input_ids=IDS, adapter_names=["b"] * 4)


def test_cat_is_the_exact_weighted_sum() -> None:
    model = two()
    model.add_weighted_adapter(["default", "b"], [0.5, -2.0], "mix", combination_type="cat")
    for layer in (module for module in model.modules() if hasattr(module, "lora_A")):
        parts = [w * layer.delta_weight(name) for name, w in (("default", 0.5), ("b", -2.0)) if name in layer.r]
        torch.testing.assert_close(layer.delta_weight("mix"), sum(parts), atol=1e-6, rtol=0)
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combination_type": "average"}, "choose one of linear"),
        ({"combination_type": "ties"}, "needs a density"),
        ({"combination_type": "linear"}, "one rank everywhere"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "loud"}, "majority_sign_method"),
    ],
)
def test_a_combination_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fl.UnsupportedError, match=message):
        two().add_weighted_adapter(["default", "b"], [1, 1], "mix", **options)


def test_adapters_of_another_kind_cannot_be_combined() -> None:
    model = fl.get_peft_model(models.llama(), CASES["DoRA"].ours())
    with pytest.raises(fl.UnsupportedError, match="without DoRA"):
        model.add_weighted_adapter(["default"], [1.0], "mix")


@pytest.mark.parametrize("rank", [2, 8, 12])
def test_a_swap_answers_as_a_fresh_load_and_adds_no_module(rank: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = fl.get_peft_model(models.llama(), fl.LoraConfig(target_modules=["q_proj"], r=rank, lora_alpha=5))
    perturb(other)
    other.save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = fl.get_peft_model(models.llama(), fl.LoraConfig(target_modules=["q_proj", "v_proj"], r=8))
    perturb(model)
    modules = [id(module) for module in model.modules()]
    model.hotswap_adapter(tmp_path)
    assert [id(module) for module in model.modules()] == modules
    torch.testing.assert_close(logits(model), logits(other), atol=1e-6, rtol=0)


def test_a_swap_that_has_no_place_is_refused(tmp_path: Path) -> None:
    fl.get_peft_model(models.llama(), fl.LoraConfig(target_modules=["o_proj"])).save_pretrained(tmp_path)
    with pytest.raises(fl.FormatError, match="has no place"):
        two().hotswap_adapter(tmp_path)
