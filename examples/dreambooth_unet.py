"""DreamBooth with QLoRA on a UNet: LoRA on attention, feed-forward and convolutions over weights in 4 bits.

    pip install diffusers && python examples/dreambooth_unet.py OUTPUT

A small random UNet stands for yours: `UNet2DConditionModel.from_pretrained(name, subfolder="unet")`.
"""

import sys

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import ferrolora as fl
from ferrolora.integrations.diffusers import save_lora_weights

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
STEPS = 40


def small_unet() -> UNet2DConditionModel:
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (16, 32)}
    sizes = {"sample_size": 8, "layers_per_block": 1, "cross_attention_dim": 32}
    return UNet2DConditionModel(**blocks, **sizes, attention_head_dim=2, norm_num_groups=4)


def main(output: str) -> None:
    torch.manual_seed(0)

    unet = fl.quantize_model(small_unet())  # linear layers to NF4; convolutions stay as they are
    fl.prepare_model_for_kbit_training(unet)
    model = fl.get_peft_model(unet, fl.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    model.print_trainable_parameters()

    # "a photo of sks dog" with the few pictures of that dog, "a photo of a dog" with others: the prior to preserve.
    latents, words = torch.randn(8, 4, 8, 8), torch.randn(2, 5, 32).repeat_interleave(4, 0)
    schedule = DDIMScheduler(steps_offset=1, clip_sample=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for step in range(STEPS):
        noise, times = torch.randn_like(latents), torch.randint(0, schedule.config.num_train_timesteps, (8,))
        predicted = model(schedule.add_noise(latents, noise, times), times, encoder_hidden_states=words).sample
        instance, prior = (F.mse_loss(predicted[rows], noise[rows]) for rows in (slice(0, 4), slice(4, 8)))
        (instance + prior).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 13 == 0:
            print(f"step {step}: loss {instance + prior:.4f}")
    save_lora_weights(output, unet=model)

    # Any pipeline over the same base reads the file. None: what a pipeline has beside the UNet is not needed here.
    rest = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    pipeline = StableDiffusionPipeline(unet=model.unload(), scheduler=schedule, **rest, requires_safety_checker=False)
    pipeline.load_lora_weights(output)
    image = pipeline(prompt_embeds=words[:1], guidance_scale=1.0, num_inference_steps=2, output_type="latent").images
    print(f"the pipeline drew latents {list(image.shape)} with the adapter from {output}")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
