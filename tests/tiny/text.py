"""Real text for the tiny models: questions of the TREC test set, one token a character."""

from pathlib import Path

import torch

_QUESTIONS = Path(__file__).parents[2] / "examples" / "data" / "TREC.test.all"


def questions(count: int = 8, length: int = 20) -> torch.Tensor:
    """The first `count` questions, cut and padded to `length` characters, as ids below 64."""
    lines = _QUESTIONS.read_text(encoding="latin-1").splitlines()[:count]
    texts = [line.split(" ", 1)[1][:length].ljust(length) for line in lines]
    return torch.tensor([[ord(character) % 64 for character in text] for text in texts])
