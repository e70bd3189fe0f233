"""Pictures and sounds: transformers' models loaded in 4 bits, trained, saved, loaded again, run by the Trainer."""

import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import ferrolora as fl
from ferrolora.adapters.lora_conv import LoraConv
from ferrolora.nn import QuantLinear
from tiny.methods import perturb

SIDE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIDE | {"num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"image_size": 16, "patch_size": 8}
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
IDS = torch.arange(3, 15).view(2, 6)
PROMPT = torch.cat([torch.full((2, 4), 63), IDS], 1)  # four image tokens, then words
WITH_IMAGE = {
    "input_ids": PROMPT,
    "attention_mask": torch.ones_like(PROMPT),
    "labels": PROMPT.masked_fill(PROMPT == 63, -100),
    "pixel_values": PIXELS,
}
QWEN_PROMPT = torch.cat([torch.full((2, 1), 61), torch.full((2, 4), 63), torch.full((2, 1), 60), IDS], 1)


def vit() -> nn.Module:
    return tf.ViTForImageClassification(tf.ViTConfig(**SIDE, **IMAGE, num_labels=3))


def swin() -> nn.Module:
    config = tf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=3
    )
    return tf.SwinForImageClassification(config)


def whisper() -> nn.Module:
    sides = {f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in
             {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
    lengths = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = tf.WhisperConfig(d_model=32, vocab_size=64, **sides, **lengths, **tokens)
    return tf.WhisperForConditionalGeneration(config)


def wav2vec2() -> nn.Module:
    layers = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = tf.Wav2Vec2Config(**SIDE, **layers, **positions, vocab_size=16, apply_spec_augment=False)
    return tf.Wav2Vec2ForCTC(config)


def llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(**SIDE, **IMAGE, projection_dim=16)
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**TEXT), vision_config=vision, image_token_id=63, image_seq_length=4
    )
    return tf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    rotary = {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    patches = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tokens = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    config = tf.Qwen2VLConfig(text_config=TEXT | {"rope_scaling": rotary}, vision_config=vision | patches, **tokens)
    return tf.Qwen2VLForConditionalGeneration(config)


def paligemma() -> nn.Module:
    text = TEXT | {"model_type": "gemma", "head_dim": 8}
    vision = SIDE | IMAGE | {"model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False}
    sizes = {"projection_dim": 32, "hidden_size": 32}
    return tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=63, **sizes)
    )


@dataclass(frozen=True)
class Case:
    """A model, a batch for it, the class that loads it, and what its adapter is."""

    make: Callable[[], Any]
    batch: Callable[[], dict[str, Any]]
    auto: Any
    float_linears: set[str]  # in 4 bits is every other one
    task: str | None = None
    adapter: Any = fl.AutoPeftModel
    targets: Any = "all-linear"
    heads: tuple[str, ...] = ()


CASES = {
    "ViT": Case(
        vit,
        lambda: {"pixel_values": PIXELS, "labels": torch.tensor([0, 2])},
        tf.AutoModelForImageClassification,
        {"classifier"},
        targets=["q_proj", "v_proj", "fc1", "projection"],
        heads=("classifier",),
    ),
    "Swin": Case(
        swin,
        lambda: {"pixel_values": PIXELS, "labels": torch.tensor([0, 2])},
        tf.AutoModelForImageClassification,
        {"classifier"},
    ),
    "Whisper": Case(
        whisper,
        lambda: {"input_features": torch.linspace(-1, 1, 2 * 8 * 32).view(2, 8, 32), "labels": IDS},
        tf.AutoModelForSpeechSeq2Seq,
        {"proj_out"},
        task="SEQ_2_SEQ_LM",
        adapter=fl.AutoPeftModelForSeq2SeqLM,
        targets=["q_proj", "v_proj", "fc1", "conv1", "conv2"],
    ),
    "wav2vec2": Case(
        wav2vec2,
        lambda: {"input_values": torch.sin(torch.arange(800.0)).view(2, 400), "labels": IDS[:, :4]},
        tf.AutoModelForCTC,
        {"lm_head"},
    ),
    "LLaVA": Case(llava, lambda: WITH_IMAGE, tf.AutoModelForImageTextToText, {"lm_head"}),
    "Qwen2-VL": Case(
        qwen2_vl,
        lambda: {
            "input_ids": QWEN_PROMPT,
            "attention_mask": torch.ones_like(QWEN_PROMPT),
            "labels": QWEN_PROMPT.masked_fill(QWEN_PROMPT >= 60, -100),
            "pixel_values": torch.linspace(-1, 1, 2 * 16 * 96).view(32, 96),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            "mm_token_type_ids": (QWEN_PROMPT == 63).int(),
        },
        tf.AutoModelForImageTextToText,
        {"lm_head"},
        task="CAUSAL_LM",
        adapter=fl.AutoPeftModelForCausalLM,
    ),
    "PaliGemma": Case(paligemma, lambda: WITH_IMAGE, tf.AutoModelForImageTextToText, {"lm_head"}),
}
EXAMPLES = Path(__file__).parents[3] / "examples"
QUANTIZED = {"quantization_config": fl.FerroloraConfig()}


@pytest.fixture(autouse=True)
def _one_thread(threads: Any) -> Any:
    """Models this small lose time on several, most of all beside other work."""
    with threads(1):
        yield


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batch).logits
    return found


def quantized(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def with_adapter(case: Case, base: nn.Module) -> fl.PeftModel:
    heads = list(case.heads) or None
    return fl.get_peft_model(
        base, fl.LoraConfig(r=4, target_modules=case.targets, task_type=case.task, modules_to_save=heads)
    )


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_loads_in_4_bits_is_saved_trained_and_loaded_again_bit_for_bit(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    batch = case.batch()
    case.make().save_pretrained(tmp_path / "float")
    first = case.auto.from_pretrained(tmp_path / "float", **QUANTIZED)
    linears = {path for path, module in first.named_modules() if isinstance(module, nn.Linear)}
    assert linears - quantized(first) == case.float_linears

    first.save_pretrained(tmp_path / "nf4")
    base = case.auto.from_pretrained(tmp_path / "nf4")
    assert quantized(base) == quantized(first)
    assert torch.equal(logits(base, batch), logits(first, batch))

    fl.prepare_model_for_kbit_training(base)
    model = with_adapter(case, base)
    convolved = any(isinstance(module, LoraConv) for module in model.modules())
    assert convolved == isinstance(case.targets, list)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.96 * losses[0]
    if convolved:
        trained = [module.lora_B["default"].weight for module in model.modules() if isinstance(module, LoraConv)]
        assert all(weight.abs().max() > 0 for weight in trained)

    model.save_pretrained(tmp_path / "adapter")
    again = case.adapter.from_pretrained(tmp_path / "adapter")
    assert quantized(again.get_base_model()) != set()
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("name", ["ViT", "Whisper", "LLaVA"])
def test_peft_reads_our_file_and_computes_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    if name == "Whisper":
        # PEFT's wrapper of a convolution does not show its stride, which the encoder reads; and its model for
        # SEQ_2_SEQ_LM passes input_ids on.
        case = replace(case, targets=["q_proj", "v_proj", "fc1"], task=None)
    case.make().save_pretrained(tmp_path / "float")
    model = with_adapter(case, case.auto.from_pretrained(tmp_path / "float", **QUANTIZED))
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        case.auto.from_pretrained(tmp_path / "float", **QUANTIZED), str(tmp_path / "adapter")
    )
    batch = case.batch()
    # The same products in another order of float32 sums over K <= 216, through at most five layers.
    torch.testing.assert_close(logits(theirs, batch), logits(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ViT", "Whisper"])
def test_the_trainer_passes_pictures_and_sounds_on(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    case.make().save_pretrained(tmp_path / "float")
    model = with_adapter(case, case.auto.from_pretrained(tmp_path / "float", **QUANTIZED))
    batch = case.batch()
    rows = [{key: values[index] for key, values in batch.items()} for index in (0, 1)] * 8
    arguments = tf.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=8,
        use_cpu=True,
        activation_checkpointing=True,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = tf.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.remove_callback(tf.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.96 * losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    again = case.adapter.from_pretrained(tmp_path / "run" / "checkpoint-8", **QUANTIZED)
    assert torch.equal(logits(again, batch), logits(trainer.model, batch))


def test_whisper_generates_with_the_adapter() -> None:
    case = CASES["Whisper"]
    model = with_adapter(case, fl.quantize_model(case.make())).eval()
    perturb(model, 0.3)
    features = case.batch()["input_features"]
    written = model.generate(input_features=features, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        start = torch.full((2, 1), model.config.decoder_start_token_id)
        first = model(input_features=features, decoder_input_ids=start).logits[:, -1].argmax(-1)
    assert torch.equal(written[:, -4:][:, 0], first)


@pytest.mark.parametrize("name", ["vit", "whisper", "vlm"])
def test_the_example_learns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    printed = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"loss'?:? '?([0-9.]+)", printed)]
    assert losses[-1] < 0.5 * losses[0]
    if name == "vit":  # guessing gives 25
        assert int(re.findall(r"answers (\d+) of 100", printed)[0]) > 60
