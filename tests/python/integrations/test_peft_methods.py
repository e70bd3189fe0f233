"""Every method of PEFT over packed layers: the numbers of a float base, and merges that are exact or refused."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import ferrolora as fl
from ferrolora.integrations.peft import accelerate, prepare
from ferrolora.nn import QuantLinear
from tiny import models
from tiny.peft_methods import BESIDE, INPUTS, LINEAR

SPECS = {"nf4": fl.QuantSpec("nf4"), "fp4": fl.QuantSpec("fp4"), "int8": fl.QuantSpec("int8")}
MERGES: dict[str, Callable[[Any], Any]] = {
    "merge_adapter": lambda model: model.merge_adapter() or model,
    "merge_adapter, safe": lambda model: model.merge_adapter(safe_merge=True) or model,
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload, safe": lambda model: model.merge_and_unload(safe_merge=True),
}
# Methods that PEFT does not merge at all, over no base.
UNMERGEABLE = {"Lily", "Poly", "BEFT"}

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, of dozens of methods


def packed(spec: fl.QuantSpec) -> nn.Module:
    torch.manual_seed(0)
    model = models.llama()
    fl.quantize_model(model, spec)
    return model


def decoded(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.dequantize())
            plain.set_submodule(name, linear)
    return plain


def adapted(base: nn.Module, method: str) -> Any:
    torch.manual_seed(1)
    model = peft.get_peft_model(base, (LINEAR | BESIDE)[method]())
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def loss_of(model: nn.Module, method: str) -> Any:
    ids = models.token_ids()
    torch.manual_seed(3)
    return model(input_ids=ids, labels=ids, **INPUTS.get(method, {}))


def step(model: nn.Module, method: str) -> tuple[Tensor, dict[str, Tensor]]:
    out = loss_of(model, method)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def logits(model: nn.Module, method: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = loss_of(model.eval(), method).logits
        return found


@pytest.mark.integration("peft", "{method}: forward, gradients, a training step")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", [*LINEAR, *BESIDE])
def test_a_prepared_base_gives_the_numbers_of_a_float_base(method: str, kind: str) -> None:
    base = packed(SPECS[kind])
    expected = step(adapted(decoded(base), method), method)
    assert prepare(base) == 14
    model = adapted(base, method)
    found = step(model, method)
    assert found[1], "nothing is trained"
    # float32 sums of at most 48 products of order 0.1, in another order, through two layers; some methods invert or
    # normalise matrices, which multiplies the rounding by a condition number of a few
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-4)

    before = float(loss_of(model, method).loss)
    norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.05 / norm**0.5 * parameter.grad
    assert float(loss_of(model, method).loss) < before


@pytest.mark.integration("peft", "{method}: merging is exact or refused")
@pytest.mark.parametrize("how", MERGES)
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("method", LINEAR)
def test_pefts_own_merge_is_refused_and_leaves_the_bytes(method: str, kind: str, how: str) -> None:
    for prepared in (False, True):
        base = packed(SPECS[kind])
        layers = [module for module in base.modules() if isinstance(module, QuantLinear)]
        codes = [layer.codes for layer in layers]
        bytes_before = [code.clone() for code in codes]
        if prepared:
            prepare(base)
        with pytest.raises(Exception):  # noqa: B017, PT011 - ours, torch's or PEFT's: any, but never a result
            MERGES[how](adapted(base, method))
        assert all(layer.codes is code for layer, code in zip(layers, codes, strict=True))
        assert all(torch.equal(code, old) for code, old in zip(codes, bytes_before, strict=True))


@pytest.mark.integration("peft", "{method}: merging is exact or refused")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", [name for name in LINEAR if name not in UNMERGEABLE])
def test_after_accelerate_a_merge_gives_float_layers_with_the_same_answers(method: str, kind: str) -> None:
    base = packed(SPECS[kind])
    prepare(base)
    model = adapted(base, method)
    assert accelerate(model) in (2, 4)
    before = logits(model, method)
    merged = model.merge_and_unload(safe_merge=kind == "int8")
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
    # W + ΔW rounded once to float32, then the sums of the products in another order
    torch.testing.assert_close(logits(merged, method), before, atol=1e-5, rtol=0)


@pytest.mark.integration("peft", "methods that compute with the weight need prepare")
@pytest.mark.parametrize("method", ["DEFT", "HiRA", "HRA", "PEANuT"])
def test_codes_are_never_taken_for_numbers(method: str) -> None:
    """Over int8, whose codes have the shape of the weight, these used to train on the codes."""
    with pytest.raises(fl.UnsupportedError, match=r"packed weight.*read_as_float"):
        step(adapted(packed(SPECS["int8"]), method), method)


def test_an_adapter_in_the_type_of_the_codes_is_refused() -> None:
    with pytest.raises(fl.UnsupportedError, match=r"unilora_scales_A.*call prepare"):
        accelerate(adapted(packed(SPECS["int8"]), "UniLoRA"))


def test_preparing_a_model_without_packed_layers_is_refused() -> None:
    with pytest.raises(fl.UnsupportedError, match="has no QuantLinear"):
        prepare(models.llama())
