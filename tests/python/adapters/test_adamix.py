"""AdaMix: picks in training, means elsewhere, an ordinary LoRA file."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import ferrolora as fl
from ferrolora.adapters.adamix import AdaMixLayer, symmetric_divergence
from tiny import models
from tiny.methods import base_of, perturb
from tiny.text import questions


def config(**options: Any) -> fl.AdaMixConfig:
    return fl.AdaMixConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "num_experts": 3} | options))


def test_training_uses_one_a_and_one_b_and_evaluation_the_means() -> None:
    layer = AdaMixLayer(torch.nn.Linear(8, 5))
    layer.add_adapter("a", config(init_lora_weights=False), "layer", True)
    layer.activate(["a"], True)
    with torch.no_grad():
        for parameter in layer.adapter_parameters("a"):
            parameter.add_(torch.randn_like(parameter))  # all copies start alike
    a, b, x = layer.adamix_A["a"], layer.adamix_B["a"], torch.randn(3, 8)
    layer.picks["a"] = (2, 1)
    torch.testing.assert_close(layer.train()(x), layer.base_layer(x) + x @ a[2].T @ b[1].T * 2)
    torch.testing.assert_close(layer.eval()(x), layer.base_layer(x) + x @ a.mean(0).T @ b.mean(0).T * 2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["float32", "nf4+dq", "int8"])
def test_it_trains_every_copy_and_its_file_is_lora_for_us_and_for_peft(kind: str, tmp_path: Path) -> None:
    base = base_of(kind)
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(10)  # type: ignore[operator]
    model, ids = fl.get_peft_model(copy.deepcopy(base), config(target_modules="all-linear")), questions()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    with torch.no_grad():
        before = model.eval()(input_ids=ids, labels=ids).loss
    for _ in range(15):
        optimizer.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert model.eval()(input_ids=ids, labels=ids).loss < 0.95 * before
    moved = [p for name, p in model.named_parameters() if "adamix_B" in name]
    assert all(bool((copy_ != 0).any()) for p in moved for copy_ in p)
    model.save_pretrained(tmp_path)
    answer = models.logits(model)
    again = fl.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert type(again.peft_config["default"]) is fl.LoraConfig
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    close = {"atol": 1e-5, "rtol": 1e-5}  # logits of order 10, ten times larger than those of the plain models
    torch.testing.assert_close(models.logits(again), answer, **close)
    torch.testing.assert_close(models.logits(theirs), answer, **close)
    merged = model.merge_and_unload(dtype=torch.float32)
    torch.testing.assert_close(models.logits(merged), answer, **close)


def test_the_loss_holds_the_divergence_of_two_passes() -> None:
    model, ids = fl.get_peft_model(models.llama(), config(consistency_weight=2.0)), models.token_ids()
    perturb(model, 0.3)
    torch.manual_seed(3)
    loss = model.train()(input_ids=ids, labels=ids).loss
    plain = fl.get_peft_model(models.llama(), config(consistency_weight=0.0))
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(3)
    first = plain.train()(input_ids=ids, labels=ids)
    second = plain(input_ids=ids, labels=ids)
    expected = first.loss + 2 * symmetric_divergence(first.logits, second.logits, ids)
    torch.testing.assert_close(loss, expected)
    assert loss > first.loss


def test_the_divergence_is_symmetric_and_leaves_out_what_has_no_label() -> None:
    p, q = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    labels = torch.tensor([[1, -100, -100], [-100, -100, 2]])
    kl = torch.nn.functional.kl_div
    lp, lq = p.log_softmax(-1), q.log_softmax(-1)
    each = 0.5 * (kl(lq, lp, log_target=True, reduction="none") + kl(lp, lq, log_target=True, reduction="none")).sum(-1)
    torch.testing.assert_close(symmetric_divergence(p, q), each.mean())
    torch.testing.assert_close(symmetric_divergence(q, p, labels), (each[0, 0] + each[1, 2]) / 2)


@pytest.mark.parametrize("options", [{"num_experts": 1}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_fields_that_do_not_apply_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(fl.UnsupportedError, match="AdaMixConfig"):
        config(**options)
