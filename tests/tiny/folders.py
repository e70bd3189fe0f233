"""Model directories as `from_pretrained` reads them: a tiny model and a tokenizer of one token a character."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ.,?!:\n0123456789"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters to ids below 64; `<end>` is the end and padding token."""
    vocabulary = {token: i for i, token in enumerate(["<end>", "<unk>", *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    made.chat_template = CHAT_TEMPLATE
    return made


def save(model: PreTrainedModel, directory: Path, shard_size: str = "5GB") -> Path:
    """Save model and tokenizer; returns the directory."""
    model.save_pretrained(directory, max_shard_size=shard_size)
    tokenizer().save_pretrained(directory)
    return directory
