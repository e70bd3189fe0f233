"""Diffusers: adapters in a UNet and a DiT, over float and 4-bit weights, and the files that pipelines exchange."""

import copy
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import ferrolora as fl
from ferrolora.adapters.lora_conv import LoraConv
from ferrolora.adapters.lora_layer import LoraLayer
from ferrolora.integrations.diffusers import WEIGHT_NAME, load_lora_weights, save_lora_weights
from ferrolora.nn import QuantLinear
from tiny.methods import perturb

LATENTS = torch.linspace(-1, 1, 2 * 4 * 8 * 8).view(2, 4, 8, 8)
WORDS = torch.linspace(-1, 1, 2 * 5 * 32).view(2, 5, 32)
EXAMPLES = Path(__file__).parents[3] / "examples"
POOLED = torch.linspace(-1, 1, 2 * 16).view(2, 16)
TIMES = torch.tensor([3, 500])
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(autouse=True)
def _one_thread(threads: Any) -> Any:
    """Models this small lose time on several, most of all beside other work."""
    with threads(1):
        yield


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def dit() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    ).eval()


def unet_output(model: nn.Module, latents: Tensor = LATENTS) -> Tensor:
    found: Tensor = model(latents, TIMES, encoder_hidden_states=WORDS).sample
    return found


def dit_output(model: nn.Module, latents: Tensor = LATENTS) -> Tensor:
    found: Tensor = model(latents, WORDS, pooled_projections=POOLED, timestep=TIMES).sample
    return found


def unet_pipeline(model: nn.Module, text_encoder: nn.Module | None = None) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=text_encoder,
        tokenizer=None,
        unet=model,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def dit_pipeline(model: nn.Module) -> Any:
    absent = dict.fromkeys(f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    return diffusers.StableDiffusion3Pipeline(
        transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, **absent
    )


# component -> (its model, what it puts out, a pipeline around it, targets beside attention)
KINDS: dict[str, tuple[Callable[[], Any], Callable[..., Tensor], Callable[..., Any], list[str]]] = {
    "unet": (unet, unet_output, unet_pipeline, ["ff.net.0.proj", "ff.net.2", "conv1", "conv_in", "time_emb_proj"]),
    "transformer": (dit, dit_output, dit_pipeline, ["ff.net.0.proj", "ff.net.2", "add_q_proj", "pos_embed.proj"]),
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6},
    "dora": {"r": 4, "use_dora": True},
    "patterns": {"r": 4, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_v": 1}, "use_rslora": True},
}


def adapted(component: str, quantized: bool, **config: Any) -> fl.PeftModel:
    make, _, _, more = KINDS[component]
    base = fl.quantize_model(make()) if quantized else make()
    model = fl.get_peft_model(base, fl.LoraConfig(target_modules=[*ATTENTION, *more], **config)).eval()
    perturb(model)
    return model


def assert_same(left: Tensor, right: Tensor) -> None:
    """Float32 sums of at most 128 products in another order, through some ten layers with normalisation between."""
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("component", KINDS)
def test_qlora_with_prior_preservation_learns_and_puts_adapters_into_every_kind_of_layer(component: str) -> None:
    make, output, _, more = KINDS[component]
    base = fl.quantize_model(make())
    assert all(isinstance(module, QuantLinear) for module in base.modules() if isinstance(module, nn.Linear))
    fl.prepare_model_for_kbit_training(base)
    assert base.is_gradient_checkpointing
    model = fl.get_peft_model(base, fl.LoraConfig(r=4, target_modules=[*ATTENTION, *more])).train()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert any(isinstance(layer, LoraConv) for layer in layers)
    assert any(isinstance(layer.base_layer, QuantLinear) for layer in layers)
    noise = torch.randn(4, *LATENTS.shape)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for step in range(12):
        instance, prior = noise[step % 2], noise[2 + step % 2]
        loss = (output(model, 0.6 * LATENTS + 0.8 * instance) - instance).square().mean()
        loss = loss + (output(model, -0.6 * LATENTS + 0.8 * prior) - prior).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert max(losses[-2:]) < 0.8 * min(losses[:2])


@pytest.mark.parametrize("component", KINDS)
def test_checkpointing_changes_no_gradient(component: str) -> None:
    _, output, _, _ = KINDS[component]
    model = adapted(component, quantized=True, r=2).train()
    gradients = []
    for _ in range(2):
        output(model).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        fl.prepare_model_for_kbit_training(model.get_base_model())
        model.set_adapter("default")
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "nf4"])
@pytest.mark.parametrize("component", KINDS)
def test_a_pipeline_reads_our_file_and_computes_what_our_model_does(
    component: str, quantized: bool, config: dict[str, Any], tmp_path: Path
) -> None:
    make, output, pipeline, _ = KINDS[component]
    model = adapted(component, quantized, **config)
    save_lora_weights(tmp_path, **{component: model})
    theirs = fl.quantize_model(make()) if quantized else make()
    with torch.no_grad():
        before = output(theirs)
        pipeline(theirs).load_lora_weights(tmp_path)
        assert (output(theirs) - before).abs().max() > 1e-3
        assert_same(output(theirs), output(model))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("component", KINDS)
def test_we_read_what_we_wrote_bit_for_bit(component: str, config: dict[str, Any], tmp_path: Path) -> None:
    make, output, _, _ = KINDS[component]
    model = adapted(component, True, **config)
    path = save_lora_weights(tmp_path, weight_name="one.safetensors", **{component: model})
    again = load_lora_weights(fl.quantize_model(make()), path, component)
    with torch.no_grad():
        assert torch.equal(output(again), output(model))


@pytest.mark.parametrize("with_metadata", [True, False])
@pytest.mark.parametrize("component", KINDS)
def test_we_read_a_file_that_diffusers_wrote(component: str, with_metadata: bool, tmp_path: Path) -> None:
    make, output, pipeline, more = KINDS[component]
    theirs = make()
    # Without metadata the file does not tell alpha, and all readers take the rank.
    other = {"lora_alpha": 2} if with_metadata else {"alpha_pattern": {"to_k": 2}}
    config = {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_k": 2}} | other
    theirs.add_adapter(peft.LoraConfig(target_modules=[*ATTENTION, *more], init_lora_weights=False, **config))
    metadata = _collate_lora_metadata({component: theirs}) if with_metadata else {}
    layers = {f"{component}_lora_layers": peft.get_peft_model_state_dict(theirs)}
    type(pipeline(theirs)).save_lora_weights(tmp_path, **layers, **metadata)
    ours = load_lora_weights(make(), tmp_path, component)
    with torch.no_grad():
        assert_same(output(ours), output(theirs))


def test_keys_and_header_are_those_that_diffusers_writes(tmp_path: Path) -> None:
    options = {"r": 4, "lora_alpha": 6, "target_modules": [*ATTENTION, "conv1"]}
    theirs = unet()
    theirs.add_adapter(peft.LoraConfig(**options))
    metadata = _collate_lora_metadata({"unet": theirs})
    layers = peft.get_peft_model_state_dict(theirs)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", unet_lora_layers=layers, **metadata)
    save_lora_weights(tmp_path / "ours", unet=fl.get_peft_model(unet(), fl.LoraConfig(**options)))
    with safe_open(tmp_path / "ours" / WEIGHT_NAME, "pt") as a, safe_open(tmp_path / "theirs" / WEIGHT_NAME, "pt") as b:
        assert set(a.keys()) == set(b.keys())
        assert all(a.get_slice(key).get_shape() == b.get_slice(key).get_shape() for key in a.keys())  # noqa: SIM118
        assert a.metadata().keys() == b.metadata().keys()
        ours, written = (json.loads(file.metadata()["lora_adapter_metadata"]) for file in (a, b))
    for fields in (ours, written):
        fields["unet.target_modules"] = sorted(fields["unet.target_modules"])
    assert ours.keys() == written.keys()
    differing = {key for key in ours if ours[key] != written[key]}
    assert differing <= {"unet.base_model_name_or_path", "unet.eva_config", "unet.loftq_config"}


def test_one_file_holds_the_adapters_of_unet_and_text_encoder(tmp_path: Path) -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=64, max_position_embeddings=8, **sizes)).eval()
    theirs = copy.deepcopy(encoder)
    text = fl.get_peft_model(encoder, fl.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    perturb(text)
    denoiser = adapted("unet", False, r=4)
    save_lora_weights(tmp_path, unet=denoiser, text_encoder=text)
    pipeline = unet_pipeline(unet(), theirs)
    pipeline.load_lora_weights(tmp_path)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        assert_same(theirs(ids).last_hidden_state, text(ids).last_hidden_state)
        assert_same(unet_output(pipeline.unet), unet_output(denoiser))


@pytest.mark.parametrize("component", KINDS)
def test_a_pipeline_runs_with_our_model_inside(component: str, tmp_path: Path) -> None:
    make, _, pipeline, _ = KINDS[component]
    model = adapted(component, True, r=4)
    save_lora_weights(tmp_path, **{component: model})
    read = pipeline(fl.quantize_model(make()))
    read.load_lora_weights(tmp_path)
    pooled = {"pooled_prompt_embeds": POOLED[:1]} if component == "transformer" else {}
    options = {"prompt_embeds": WORDS[:1], "latents": LATENTS[:1], "num_inference_steps": 2, "guidance_scale": 1.0}
    images = []
    for pipe in (pipeline(model.get_base_model()), read):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(**options, **pooled, height=64, width=64, output_type="latent").images)
    assert not torch.equal(images[0], LATENTS[:1])
    assert_same(*images)


def test_an_adapter_names_the_directory_its_base_came_from(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    base = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    weight = base.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.detach().clone()
    config = fl.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["to_q"])
    model = fl.get_peft_model(fl.quantize_model(base), config)
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path)
    layer = model.get_submodule("base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    u, s, vh = torch.linalg.svd(weight)
    torch.testing.assert_close(product, u[:, :4] * s[:4] @ vh[:4], rtol=1e-4, atol=1e-5)
    with pytest.raises(fl.UnsupportedError, match=r"pissa.* changed the base"):
        save_lora_weights(tmp_path / "lora", unet=model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: fl.IA3Config(target_modules=["to_k"], feedforward_modules=[]), "holds LoRA, not"),
        (lambda: fl.LoraConfig(target_modules=["to_k"], modules_to_save=["conv_out"]), "no place for conv_out"),
        (lambda: fl.LoraConfig(target_modules=["to_q", "to_out.0"], bias="lora_only"), r"no place for .*\.bias"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(config: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(fl.UnsupportedError, match=message):
        save_lora_weights(tmp_path, unet=fl.get_peft_model(unet(), config()))
    assert not list(tmp_path.iterdir())


def test_a_file_for_something_else_is_refused(tmp_path: Path) -> None:
    save_lora_weights(tmp_path, unet=adapted("unet", False, r=2))
    with pytest.raises(fl.FormatError, match=r"nothing for component 'transformer'.*\['unet'\]"):
        load_lora_weights(dit(), tmp_path, "transformer")
    with pytest.raises(fl.FormatError, match="does not exist"):
        load_lora_weights(unet(), tmp_path / "nowhere")
    smaller = unet()
    smaller.mid_block.attentions = nn.ModuleList()
    with pytest.raises(fl.FormatError, match="have no place"):
        load_lora_weights(smaller, tmp_path)
    with pytest.raises(fl.UnsupportedError, match="by its name in the pipeline"):
        save_lora_weights(tmp_path)


@pytest.mark.parametrize("name", ["dreambooth_unet", "dreambooth_dit"])
def test_the_example_learns_and_a_pipeline_draws_with_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(tmp_path)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert (tmp_path / WEIGHT_NAME).is_file()
    printed = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"loss ([0-9.]+)", printed)]
    assert losses[-1] < 0.9 * losses[0]
    assert "drew latents [1, 4, 8, 8]" in printed
