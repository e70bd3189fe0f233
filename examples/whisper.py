"""QLoRA on Whisper, an encoder-decoder that hears: which two notes were played?

    pip install . && python examples/whisper.py OUTPUT

A small random model stands for yours: give `from_pretrained` its name, and take the processor that comes with it.
"""

import sys

import torch
import transformers

import ferrolora as fl

RATE = 16000
NOTES = {"c": 262, "g": 784, "d": 2349}  # their pitch in Hz
START, END, FIRST = 0, 1, 2  # token ids; the notes are 2, 3, 4
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "conv1", "conv2"]  # convolutions stay float


def sounds(count: int, generator: torch.Generator) -> tuple[list, torch.Tensor]:
    """Waves of a second, half of it one note and half another, and the notes as token ids."""
    notes = torch.randint(0, len(NOTES), (count, 2), generator=generator)
    time = torch.arange(RATE // 2) / RATE
    tones = torch.stack([torch.sin(2 * torch.pi * pitch * time) for pitch in NOTES.values()])
    waves = tones[notes].flatten(1) + 0.05 * torch.randn(count, RATE, generator=generator)
    return list(waves.numpy()), torch.cat([notes + FIRST, torch.full((count, 1), END)], 1)


def main(output: str) -> None:
    torch.manual_seed(0)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    tokens = {"pad_token_id": END, "eos_token_id": END, "bos_token_id": START, "decoder_start_token_id": START}
    sizes = {"d_model": 48, "vocab_size": 8, "num_mel_bins": 16, "max_source_positions": 50}
    config = transformers.WhisperConfig(**sizes, **tokens, encoder_layers=1, decoder_layers=1, init_std=0.2)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(output)

    base = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(output, quantization_config=fl.FerroloraConfig())
    config = fl.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    model = fl.get_peft_model(base, config)
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(61):
        waves, labels = sounds(16, generator)
        loss = model.train()(**extractor(waves, sampling_rate=RATE, return_tensors="pt"), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss:.4f}")
    model.save_pretrained(f"{output}/adapter")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
