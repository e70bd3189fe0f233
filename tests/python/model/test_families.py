"""The families of transformers models: automatic targets of LoRA and IA3, a training step, saving, loading, merging."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import ferrolora as fl
from ferrolora.adapters.ia3 import IA3Layer
from ferrolora.adapters.lora_layer import LoraLayer
from tiny.methods import perturb

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {"image_size": 16, "patch_size": 8}
IDS = torch.arange(3, 15).view(2, 6)
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def special(**more: Any) -> dict[str, Any]:
    return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | more


FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {  # name -> (model class, its configuration, inputs)
    "Llama": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**GROUPED), TEXT),
    "Mistral": (tf.MistralForCausalLM, lambda: tf.MistralConfig(**GROUPED), TEXT),
    "Qwen2": (tf.Qwen2ForCausalLM, lambda: tf.Qwen2Config(**SMALL, num_key_value_heads=2), TEXT),
    "Qwen3": (tf.Qwen3ForCausalLM, lambda: tf.Qwen3Config(**GROUPED), TEXT),
    "Gemma": (tf.GemmaForCausalLM, lambda: tf.GemmaConfig(**GROUPED), TEXT),
    "Gemma2": (tf.Gemma2ForCausalLM, lambda: tf.Gemma2Config(**GROUPED), TEXT),
    "Phi": (tf.PhiForCausalLM, lambda: tf.PhiConfig(**SMALL, **special()), TEXT),
    "Phi3": (tf.Phi3ForCausalLM, lambda: tf.Phi3Config(**SMALL, **special()), TEXT),
    "GPT-2": (
        tf.GPT2LMHeadModel,
        lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, **special()),
        TEXT,
    ),
    "GPT-NeoX": (tf.GPTNeoXForCausalLM, lambda: tf.GPTNeoXConfig(**SMALL, **special()), TEXT),
    "OPT": (
        tf.OPTForCausalLM,
        lambda: tf.OPTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            vocab_size=64,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        ),
        TEXT,
    ),
    "BLOOM": (tf.BloomForCausalLM, lambda: tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64), TEXT),
    "Falcon": (
        tf.FalconForCausalLM,
        lambda: tf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, **special()),
        TEXT,
    ),
    "T5": (tf.T5ForConditionalGeneration, lambda: tf.T5Config(**SEQ2SEQ, decoder_start_token_id=0), TEXT),
    "mT5": (tf.MT5ForConditionalGeneration, lambda: tf.MT5Config(**SEQ2SEQ, decoder_start_token_id=0), TEXT),
    "BART": (tf.BartForConditionalGeneration, lambda: tf.BartConfig(**BART), TEXT),
    "BERT": (tf.BertForMaskedLM, lambda: tf.BertConfig(**SMALL), TEXT),
    "RoBERTa": (tf.RobertaForMaskedLM, lambda: tf.RobertaConfig(**SMALL), TEXT),
    "DeBERTa": (tf.DebertaForMaskedLM, lambda: tf.DebertaConfig(**SMALL), TEXT),
    "DeBERTa-v2": (tf.DebertaV2ForMaskedLM, lambda: tf.DebertaV2Config(**SMALL), TEXT),
    "ViT": (
        tf.ViTForImageClassification,
        lambda: tf.ViTConfig(**VISION, **IMAGE, num_labels=3),
        {"pixel_values": PIXELS},
    ),
    "Whisper": (
        tf.WhisperForConditionalGeneration,
        lambda: tf.WhisperConfig(**BART, num_mel_bins=8, max_source_positions=16, max_target_positions=16),
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 32).view(2, 8, 32)},
    ),
    "CLIP": (
        tf.CLIPModel,
        lambda: tf.CLIPConfig(text_config=SMALL | special(), vision_config=VISION | IMAGE, projection_dim=16),
        TEXT | {"pixel_values": PIXELS},
    ),
    "LLaVA": (
        tf.LlavaForConditionalGeneration,
        lambda: tf.LlavaConfig(
            text_config=tf.LlamaConfig(**GROUPED),
            vision_config=tf.CLIPVisionConfig(**VISION, **IMAGE, projection_dim=16),
            image_token_id=63,
            image_seq_length=4,
        ),
        {
            "input_ids": torch.cat([torch.full((2, 4), 63), IDS], 1),
            "attention_mask": torch.ones(2, 10, dtype=torch.long),
            "pixel_values": PIXELS,
        },
    ),
}


def output(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    more = {}
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        more = {"decoder_input_ids": IDS}
    found = model(**inputs, **more)
    first: torch.Tensor = found.logits if hasattr(found, "logits") else found.logits_per_text
    return first


@pytest.mark.parametrize("family", FAMILIES)
def test_automatic_targets_train_save_load_and_merge(family: str, tmp_path: Path) -> None:
    cls, make_config, inputs = FAMILIES[family]
    base = cls(make_config()).eval()
    model = fl.get_peft_model(copy.deepcopy(base), fl.LoraConfig(r=2, init_lora_weights=False))
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) >= 8
    output(model, inputs).square().mean().backward()
    # What lies behind an output that nothing reads gets no gradient: a pooling, LLaVA's last vision layer of four.
    reached = [p.grad is not None for p in model.parameters() if p.requires_grad]
    assert sum(reached) >= 0.75 * len(reached)
    model.eval()
    with torch.no_grad():
        before = output(model, inputs)
        assert not torch.equal(before, output(base, inputs))
        model.save_pretrained(tmp_path)
        again = fl.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        saved, loaded = model.state_dict(), again.state_dict()
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)
        # Not the same bits: torch's own float products differ with the alignment of what was loaded.
        torch.testing.assert_close(output(again, inputs), before, rtol=1e-5, atol=1e-6)
        merged = model.merge_and_unload()
        # (W + Δ)x for Wx + Δx through two layers; outputs of some families reach 100
        torch.testing.assert_close(output(merged, inputs), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ia3_finds_keys_values_and_feedforward_layers(family: str) -> None:
    cls, make_config, inputs = FAMILIES[family]
    model = fl.get_peft_model(cls(make_config()).eval(), fl.IA3Config())
    layers = [module for module in model.modules() if isinstance(module, IA3Layer)]
    fed = [layer for layer in layers if layer.is_feedforward["default"]]
    assert len(fed) >= (0 if family == "ViT" else 2)
    assert len(layers) - len(fed) >= 2
    perturb(model)
    output(model, inputs).square().mean().backward()
    assert any(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "OPT", "T5", "BERT", "ViT", "Whisper"])
def test_automatic_targets_work_over_packed_weights(family: str) -> None:
    cls, make_config, inputs = FAMILIES[family]
    base = fl.quantize_model(cls(make_config()).eval(), fl.QuantSpec("nf4"))
    model = fl.get_peft_model(base, fl.LoraConfig(r=2, init_lora_weights=False)).eval()
    output(model, inputs).square().mean().backward()
    assert any(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        before = output(model, inputs)
        model.merge_adapter()
        torch.testing.assert_close(output(model, inputs), before, atol=1e-4, rtol=1e-4)


AUTO = {
    "CAUSAL_LM": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**GROUPED), fl.AutoPeftModelForCausalLM),
    "SEQ_2_SEQ_LM": (tf.BartForConditionalGeneration, lambda: tf.BartConfig(**BART), fl.AutoPeftModelForSeq2SeqLM),
    "SEQ_CLS": (
        tf.BertForSequenceClassification,
        lambda: tf.BertConfig(**SMALL, num_labels=3),
        fl.AutoPeftModelForSequenceClassification,
    ),
    "TOKEN_CLS": (
        tf.BertForTokenClassification,
        lambda: tf.BertConfig(**SMALL, num_labels=3),
        fl.AutoPeftModelForTokenClassification,
    ),
    "QUESTION_ANS": (
        tf.BertForQuestionAnswering,
        lambda: tf.BertConfig(**SMALL),
        fl.AutoPeftModelForQuestionAnswering,
    ),
    "FEATURE_EXTRACTION": (tf.BertModel, lambda: tf.BertConfig(**SMALL), fl.AutoPeftModelForFeatureExtraction),
}


@pytest.mark.parametrize("method", ["LoRA", "prefix"])
@pytest.mark.parametrize("task", AUTO)
def test_every_task_has_a_class_that_loads_base_and_adapter(task: str, method: str, tmp_path: Path) -> None:
    cls, make_config, auto = AUTO[task]
    cls(make_config()).save_pretrained(tmp_path / "base")
    base = cls.from_pretrained(tmp_path / "base")
    config = (
        fl.LoraConfig(r=2, task_type=task, init_lora_weights=False)
        if method == "LoRA"
        else fl.PrefixTuningConfig(num_virtual_tokens=2, task_type=task)
    )
    model = fl.get_peft_model(base, config)
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    again = auto.from_pretrained(tmp_path / "adapter")
    assert type(again).__name__.startswith(type(model).__name__.partition("[")[0])
    more = {"decoder_input_ids": IDS} if task == "SEQ_2_SEQ_LM" else {}
    with torch.no_grad():
        left, right = (each.eval()(**TEXT, **more)[0] for each in (model, again))
    assert torch.equal(left, right)
