"""QLoRA on a vision-language model (LLaVA): "what colour is the square?" is answered from the picture.

    pip install . && python examples/vlm.py OUTPUT

LoRA goes into all linear layers of vision tower, projector and language model, which are in 4 bits.
A small random model and hand-made token ids stand for yours: give `from_pretrained` its name, and take its processor.
"""

import sys

import torch
import transformers

import ferrolora as fl

COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
IMAGE, WHAT, COLOUR, FIRST = 63, 10, 11, 20  # token ids; the answers are 20, 21, …


def questions(count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A coloured square on noise, four image tokens, the question, and the answer, which alone is a label."""
    answers = torch.randint(0, len(COLOURS), (count,), generator=generator)
    pixels = 0.2 * torch.randn(count, 3, 16, 16, generator=generator)
    corners = torch.randint(0, 8, (count, 2), generator=generator).tolist()
    for image, answer, (row, column) in zip(pixels, answers, corners, strict=True):
        image[:, row : row + 8, column : column + 8] += COLOURS[answer][:, None, None]
    prompt = torch.tensor([IMAGE] * 4 + [WHAT, COLOUR]).expand(count, -1)
    ids = torch.cat([prompt, FIRST + answers[:, None]], 1)
    labels = torch.cat([torch.full_like(prompt, -100), FIRST + answers[:, None]], 1)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def main(output: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**sizes, vocab_size=64, initializer_range=0.2)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, image_seq_length=4)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(output)

    load = {"quantization_config": fl.FerroloraConfig()}
    base = transformers.AutoModelForImageTextToText.from_pretrained(output, **load)
    fl.prepare_model_for_kbit_training(base)
    model = fl.get_peft_model(base, fl.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(61):
        loss = model.train()(**questions(16, generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}")
    model.save_pretrained(f"{output}/adapter")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
