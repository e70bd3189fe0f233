"""QLoRA on a vision transformer with transformers' Trainer: what colour is the square in the picture?

    pip install '.[train]' && python examples/vit.py OUTPUT

LoRA goes into linear layers and the convolution that embeds patches; the new classifier is trained in full.
A small random model stands for yours: give `from_pretrained` its name.
"""

import sys

import torch
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import ferrolora as fl

COLOURS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"]


def pictures(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Noise with a coloured 8x8 square somewhere; the label is its colour."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.2 * torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.randint(0, len(COLOURS), (count,), generator=generator)
    corners = torch.randint(0, 8, (count, 2), generator=generator).tolist()
    for image, label, (row, column) in zip(pixels, labels, corners, strict=True):
        image[:, row : row + 8, column : column + 8] += COLOURS[label][:, None, None]
    return {"pixel_values": pixels, "labels": labels}


def main(output: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=4)).save_pretrained(output)
    load = {"quantization_config": fl.FerroloraConfig()}  # linear layers to NF4 as they are read
    base = AutoModelForImageClassification.from_pretrained(output, **load)
    model = fl.get_peft_model(base, fl.LoraConfig(r=8, target_modules=TARGETS, modules_to_save=["classifier"]))
    model.print_trainable_parameters()

    data = pictures(256, seed=1)
    rows = [{key: values[index] for key, values in data.items()} for index in range(256)]
    arguments = {"per_device_train_batch_size": 16, "learning_rate": 1e-2, "num_train_epochs": 3, "logging_steps": 8}
    quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": not torch.cuda.is_available()}
    Trainer(model, TrainingArguments(f"{output}/run", **arguments, **quiet), train_dataset=rows).train()
    model.save_pretrained(f"{output}/adapter")

    again, test = fl.AutoPeftModel.from_pretrained(f"{output}/adapter", **load), pictures(100, seed=2)
    with torch.no_grad():
        right = again(pixel_values=test["pixel_values"]).logits.argmax(-1) == test["labels"]
    print(f"the reloaded adapter answers {int(right.sum())} of 100 new pictures right")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
