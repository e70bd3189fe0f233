"""The models that tests put adapters into. Call `torch.manual_seed` first: weights are drawn."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 64


def llama(**overrides: object) -> LlamaForCausalLM:
    """Two layers, width 32, grouped key-value heads."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | overrides))).eval()


def gpt2() -> GPT2LMHeadModel:
    """Two layers, width 32; its linear layers are Conv1D, and its head is tied to its embedding."""
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=64)).eval()


def bert_classifier() -> BertForSequenceClassification:
    """Two layers, width 32, three classes; biases everywhere."""
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def token_ids() -> torch.Tensor:
    """Two rows of six tokens."""
    return torch.arange(12).view(2, 6)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """The model's answer to `token_ids()`, in evaluation mode."""
    ids = token_ids()
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
