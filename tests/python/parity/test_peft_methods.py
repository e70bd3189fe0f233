"""Numbers of PEFT 0.21 beyond files: combinations of adapters, AdaLoRA's allocation, convolutions, mixed batches."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import ferrolora as fl
from tiny import models
from tiny.methods import perturb

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"),
]


class ConvNet(nn.Module):
    """A convolution with stride, one with groups, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.line = nn.Conv1d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.grouped(torch.relu(self.second(torch.relu(self.first(x)))))
        return self.head(self.line(y.flatten(2)).mean(2))


CONV_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"target_modules": ["first", "second", "grouped", "line"], "r": 4}),
    "LoRA with bias": ("LoraConfig", {"target_modules": ["first", "line"], "r": 4, "lora_bias": True}),
    "DoRA": ("LoraConfig", {"target_modules": ["first", "second", "line"], "r": 4, "use_dora": True}),
    "IA3": ("IA3Config", {"target_modules": ["first", "second"], "feedforward_modules": ["second"]}),
    "LoHa": ("LoHaConfig", {"target_modules": ["first", "second", "line", "head"], "r": 3}),
    "LoHa with cores": ("LoHaConfig", {"target_modules": ["first", "line"], "r": 3, "use_effective_conv2d": True}),
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("name", CONV_CASES)
def test_convolutions_agree_in_both_directions_and_merge(name: str, tmp_path: Path) -> None:
    kind, options = CONV_CASES[name]
    base, x = ConvNet().eval(), torch.randn(2, 3, 8, 8)
    ours = fl.get_peft_model(copy.deepcopy(base), getattr(fl, kind)(**options)).eval()
    perturb(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    close = {"atol": 1e-6, "rtol": 1e-5}  # the same few hundred float32 products, in another order for DoRA and LoHa
    torch.testing.assert_close(ours(x), theirs(x), **close)
    made = peft.get_peft_model(copy.deepcopy(base), getattr(peft, kind)(**options)).eval()
    perturb(made)
    made.save_pretrained(tmp_path / "theirs")
    read = fl.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(read(x), made(x), **close)
    before = ours(x)
    assert not torch.equal(before, base(x))
    if name == "LoRA":
        with pytest.raises(fl.UnsupportedError, match="crosses groups"):
            ours.merge_adapter()
        return
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), before, **close)


WAYS = [
    ("linear", {}),
    ("cat", {}),
    ("svd", {}),
    ("svd", {"svd_rank": 2}),
    ("ties", {"density": 0.6}),
    ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    ("dare_linear", {"density": 0.6}),
    ("dare_ties", {"density": 0.6}),
    ("magnitude_prune", {"density": 0.6}),
    ("ties_svd", {"density": 0.6}),
    ("dare_linear_svd", {"density": 0.6}),
    ("magnitude_prune_svd", {"density": 0.6}),
]


@pytest.mark.parametrize(("way", "options"), WAYS, ids=str)
def test_combined_adapters_are_those_of_peft(way: str, options: dict[str, Any]) -> None:
    base = models.llama()
    answers = []
    for library in (peft, fl):
        torch.manual_seed(1)
        model = library.get_peft_model(
            copy.deepcopy(base), library.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=6)
        )
        model.add_adapter("b", library.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, lora_alpha=3))
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        torch.manual_seed(2)  # the samples of DARE
        model.add_weighted_adapter(["default", "b"], [0.7, -0.4], "mix", combination_type=way, **options)
        model.set_adapter("mix")
        answers.append(models.logits(model))
    # the same matrices; a decomposition reproduces its product to a few float32 roundings of values of order 30
    torch.testing.assert_close(answers[1], answers[0], atol=1e-4 if "svd" in way else 1e-6, rtol=0)


def test_a_mixed_batch_answers_as_in_peft() -> None:
    base = models.llama()
    names = ["default", "__base__", "b", "default"]
    ids = torch.arange(24).view(4, 6)
    answers = []
    for library in (peft, fl):
        model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(target_modules=["q_proj", "v_proj"]))
        model.add_adapter("b", library.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        with torch.no_grad():
            answers.append(model.eval()(input_ids=ids, adapter_names=names).logits)
    # rows of a batch multiplied in groups: float32 sums of 48 products of order 0.1
    torch.testing.assert_close(answers[1], answers[0], atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")  # of its own file
def test_adalora_prunes_the_same_singular_values_as_peft_and_reads_and_writes_its_file(tmp_path: Path) -> None:
    base = models.llama()
    options: dict[str, Any] = {
        "target_modules": ["q_proj", "v_proj"],
        "init_r": 6,
        "target_r": 2,
        "tinit": 2,
        "tfinal": 2,
    }
    options["task_type"] = "CAUSAL_LM"  # without a task PEFT leaves the penalty out of the loss
    made = {}
    for library in (peft, fl):
        torch.manual_seed(1)
        model = library.get_peft_model(
            copy.deepcopy(base), library.AdaLoraConfig(**options, total_step=9, deltaT=2)
        ).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for step in range(1, 8):
            optimizer.zero_grad()
            model(input_ids=models.token_ids(), labels=models.token_ids()).loss.backward()
            optimizer.step()
            (model.base_model if library is peft else model).update_and_allocate(step)
        made[library] = model
    theirs, ours = made[peft], made[fl]
    expected = {key.replace(".default", ""): mask for key, mask in theirs.peft_config["default"].rank_pattern.items()}
    assert {key.removeprefix("model."): mask for key, mask in expected.items()} == {
        key.removeprefix("model."): mask for key, mask in ours.peft_config["default"].rank_pattern.items()
    }
    assert sum(sum(mask) for mask in ours.peft_config["default"].rank_pattern.values()) == 2 * 4
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    # 7 steps of gradient descent from the same start; the penalty's gradient sums in another order
    close = {"atol": 1e-5, "rtol": 0.0}
    read_by_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(models.logits(read_by_peft), models.logits(ours), **close)
    read_here = fl.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    torch.testing.assert_close(models.logits(read_here), models.logits(theirs), **close)
    again = fl.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(models.logits(again), models.logits(ours), atol=1e-6, rtol=0)


def test_the_default_targets_of_ia3_are_keys_values_and_the_second_feedforward_layer() -> None:
    for maker in (models.llama, models.gpt2, models.bert_classifier):
        ours = fl.get_peft_model(maker(), fl.IA3Config())
        theirs = peft.get_peft_model(maker(), peft.IA3Config())
        trained = [{name for name, p in model.named_parameters() if "ia3_l" in name} for model in (ours, theirs)]
        if maker is models.bert_classifier:  # PEFT's table also rescales the input of the attention's output layer
            trained[1] = {name for name in trained[1] if "attention.output" not in name}
        assert trained[0] == trained[1]
