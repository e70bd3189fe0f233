"""The models that tests put adapters into. Call `torch.manual_seed` first: weights are drawn."""

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
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


def mistral() -> MistralForCausalLM:
    """Two layers, width 32, a sliding window of 16."""
    return MistralForCausalLM(
        MistralConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            vocab_size=VOCABULARY,
            sliding_window=16,
        )
    ).eval()


def mixtral() -> MixtralForCausalLM:
    """Two layers, width 32, two of four experts of width 40 a token; a checkpoint has its own names for the experts."""
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=40,
            num_local_experts=4,
            num_experts_per_tok=2,
            vocab_size=VOCABULARY,
        )
    ).eval()


def qwen3_moe() -> Qwen3MoeForCausalLM:
    """Two layers, width 36, two of six experts of width 20 a token: rows are not whole blocks."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            moe_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            vocab_size=VOCABULARY,
        )
    ).eval()


def _bert(labels: int) -> BertConfig:
    return BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        num_labels=labels,
    )


def bert_classifier() -> BertForSequenceClassification:
    """Two layers, width 32, three classes; biases everywhere."""
    return BertForSequenceClassification(_bert(3)).eval()


def bert_tagger() -> BertForTokenClassification:
    """The same with a class for each token."""
    return BertForTokenClassification(_bert(3)).eval()


def bert_reader() -> BertForQuestionAnswering:
    """The same that marks an answer."""
    return BertForQuestionAnswering(_bert(2)).eval()


def t5() -> T5ForConditionalGeneration:
    """Three layers a side, width 32, no tied head."""
    config = T5Config(
        d_model=32,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        d_kv=8,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config).eval()


def bart() -> BartForConditionalGeneration:
    """Two layers a side, width 32."""
    config = BartConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    config.forced_eos_token_id = None
    return BartForConditionalGeneration(config).eval()


def token_ids() -> torch.Tensor:
    """Two rows of six tokens."""
    return torch.arange(12).view(2, 6)


def logits(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """The model's answer to `token_ids()` and `inputs`, in evaluation mode."""
    ids = token_ids()
    with torch.no_grad():
        output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs)
    return output.logits if hasattr(output, "logits") else torch.stack([output.start_logits, output.end_logits])
