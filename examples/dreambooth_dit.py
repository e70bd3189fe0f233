"""DreamBooth with QLoRA on a diffusion transformer (Stable Diffusion 3): LoRA over weights in 4 bits, flow matching.

    pip install diffusers && python examples/dreambooth_dit.py OUTPUT

A small random model stands for yours: `SD3Transformer2DModel.from_pretrained(name, subfolder="transformer")`.
"""

import sys

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

import ferrolora as fl
from ferrolora.integrations.diffusers import save_lora_weights

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "pos_embed.proj", "proj_out"]
STEPS = 53


def small_transformer() -> SD3Transformer2DModel:
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    sizes |= {"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 32, "pos_embed_max_size": 16}
    return SD3Transformer2DModel(**sizes, caption_projection_dim=32, pooled_projection_dim=16)


def main(output: str) -> None:
    torch.manual_seed(0)

    transformer = fl.quantize_model(small_transformer(), skip_modules=["proj_out"])  # the last layer stays float
    fl.prepare_model_for_kbit_training(transformer)
    model = fl.get_peft_model(transformer, fl.LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    model.print_trainable_parameters()

    latents = torch.randn(4, 4, 8, 8)  # the few pictures of "sks dog"
    words, pooled = torch.randn(1, 5, 32), torch.randn(1, 16)  # its prompt, from the text encoders
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        noise, sigma = torch.randn_like(latents), torch.rand(4, 1, 1, 1)
        inputs = {"encoder_hidden_states": words.expand(4, -1, -1), "pooled_projections": pooled.expand(4, -1)}
        predicted = model((1 - sigma) * latents + sigma * noise, timestep=1000 * sigma.flatten(), **inputs).sample
        loss = F.mse_loss(predicted, noise - latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 13 == 0:
            print(f"step {step}: loss {loss:.4f}")
    save_lora_weights(output, transformer=model)

    parts = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3", "vae")
    schedule = FlowMatchEulerDiscreteScheduler()
    pipeline = StableDiffusion3Pipeline(transformer=model.unload(), scheduler=schedule, **dict.fromkeys(parts))
    pipeline.load_lora_weights(output)  # any pipeline over the same base reads the file
    prompt = {"prompt_embeds": words, "pooled_prompt_embeds": pooled, "guidance_scale": 1.0}
    image = pipeline(**prompt, height=64, width=64, num_inference_steps=2, output_type="latent").images
    print(f"the pipeline drew latents {list(image.shape)} with the adapter from {output}")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
