"""Virtual tokens: their starts, their files, what they do to a batch and to a generation."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ferrolora as fl
from ferrolora.model.kbit import enable_checkpointing
from tiny import folders, models
from tiny.methods import CASES, base_of, perturb

IDS = models.token_ids()
KINDS = ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig", "MultitaskPromptTuningConfig"]


def prompted(kind: str = "PromptTuningConfig", base: nn.Module | None = None, **options: Any) -> fl.PeftModel:
    fields = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"} | options
    return fl.get_peft_model(base or models.llama(), getattr(fl, kind)(**fields))


def test_random_tokens_and_only_they_are_trained() -> None:
    model = prompted()
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"prompt_encoder.default.embedding.weight": (3, 32)}
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_tokens_of_the_vocabulary_are_rows_of_the_embedding() -> None:
    model = prompted(prompt_tuning_init="SAMPLE_VOCAB")
    rows = model.get_input_embeddings().weight
    tokens = model.prompt_encoder["default"].embedding.weight
    assert all(any(torch.equal(token, row) for row in rows) for token in tokens)


def test_a_text_is_repeated_or_cut_to_the_number_of_tokens(tmp_path: Path) -> None:
    folders.tokenizer().save_pretrained(tmp_path)
    ids = folders.tokenizer()("ab")["input_ids"]
    for count in (1, 5):
        model = prompted(
            num_virtual_tokens=count,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="ab",
            tokenizer_name_or_path=str(tmp_path),
        )
        expected = model.get_input_embeddings()(torch.tensor((ids * 3)[:count]))
        assert torch.equal(model.prompt_encoder["default"].embedding.weight, expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 0}, "positive integer"),
        ("PromptTuningConfig", {"prompt_tuning_init": "POEM"}, "choose one of RANDOM"),
        ("PromptTuningConfig", {"prompt_tuning_init": "TEXT"}, "needs prompt_tuning_init_text"),
        ("PromptTuningConfig", {"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs"),
        ("PromptEncoderConfig", {"encoder_reparameterization_type": "GRU"}, "choose one of"),
        ("PrefixTuningConfig", {"init_weights": "one"}, "init_weights"),
        ("MultitaskPromptTuningConfig", {"num_ranks": 0}, "at least 1"),
        ("MultitaskPromptTuningConfig", {"prompt_tuning_init": "EXACT_SOURCE_TASK"}, "state_dict_path"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fl.UnsupportedError, match=message):
        getattr(fl, kind)(**({"num_virtual_tokens": 3} | options))


def test_prompt_tuning_is_the_base_on_embeddings_with_the_tokens_in_front() -> None:
    base = models.llama()
    model = prompted(base=base).eval()
    embeds = torch.cat(
        [model.prompt_encoder["default"].embedding.weight.expand(2, -1, -1), base.get_input_embeddings()(IDS)], 1
    )
    assert torch.equal(models.logits(model), base(inputs_embeds=embeds, attention_mask=torch.ones(2, 9)).logits)
    with model.disable_adapter():
        assert torch.equal(models.logits(model), models.logits(base))


def test_a_prefix_is_what_attention_sees_before_the_input() -> None:
    """One layer of plain attention, written out: keys and values of the prefix first."""
    base = models.llama(num_hidden_layers=1, num_key_value_heads=4)
    model = prompted("PrefixTuningConfig", base=base).eval()
    flat = model.prompt_encoder["default"].embedding.weight.detach()  # [3, 2·32]
    keys, values = flat.view(3, 2, 4, 8).permute(1, 2, 0, 3)  # each [heads, n, 8]
    from transformers import DynamicCache

    cache = DynamicCache(config=base.config)
    cache.update(keys.expand(2, -1, -1, -1), values.expand(2, -1, -1, -1), 0)
    expected = base(input_ids=IDS, attention_mask=torch.ones(2, 9), past_key_values=cache).logits
    assert torch.equal(models.logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_returns_the_given_tokens_and_the_new_ones(kind: str, beams: int) -> None:
    model = prompted(kind)
    perturb(model)
    inputs = {"task_ids": torch.tensor([0, 0])} if kind.startswith("Multitask") else {}
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    answer = model.eval().generate(IDS, attention_mask=torch.ones_like(IDS), **options, **inputs)
    assert answer.shape == (2, 10)
    assert torch.equal(answer[:, :6], IDS)
    if beams == 1:  # greedy: each new token is the argmax of a forward pass over what came before
        for position in range(6, 10):
            logits = model(input_ids=answer[:, :position], **inputs).logits[:, -1]
            assert torch.equal(logits.argmax(-1), answer[:, position])


@pytest.mark.parametrize("maker", [models.t5, models.bart])
@pytest.mark.parametrize("kind", KINDS[:3])
def test_encoder_decoders_generate_as_their_forward_says(maker: Any, kind: str) -> None:
    model = prompted(kind, base=maker(), task_type="SEQ_2_SEQ_LM")
    perturb(model)
    answer = model.eval().generate(input_ids=IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    for position in range(1, 4):
        with torch.no_grad():
            logits = model(input_ids=IDS, decoder_input_ids=answer[:, :position]).logits[:, -1]
        assert torch.equal(logits.argmax(-1), answer[:, position])


@pytest.mark.parametrize("network", ["MLP", "LSTM"])
def test_p_tuning_goes_on_where_it_stopped(network: str, tmp_path: Path) -> None:
    options = {"encoder_reparameterization_type": network, "encoder_hidden_size": 16}
    base = models.llama()

    def train(model: fl.PeftModel, steps: int) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(steps):
            optimizer.zero_grad()
            model.train()(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()

    model = prompted("PromptEncoderConfig", copy.deepcopy(base), **options)
    train(model, 2)
    model.save_pretrained(tmp_path)
    again = fl.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    train(model, 2)
    train(again, 2)
    assert torch.equal(models.logits(again), models.logits(model))


def test_without_the_network_in_the_file_the_finished_tokens_are_trained(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = models.llama()
    model = prompted("PromptEncoderConfig", copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(file)["prompt_embeddings"]}, file)
    again = fl.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert [name for name, p in again.named_parameters() if p.requires_grad] == ["prompt_encoder.default.tokens"]
    assert torch.equal(models.logits(again), models.logits(model))


def test_a_target_task_starts_from_the_sources(tmp_path: Path) -> None:
    base = models.llama()
    source = prompted("MultitaskPromptTuningConfig", copy.deepcopy(base), num_tasks=3, num_ranks=2)
    perturb(source)
    source.save_pretrained(tmp_path)
    old = source.prompt_encoder["default"]
    path = str(tmp_path / "adapter_model.safetensors")
    for start, expected in {
        "AVERAGE_SOURCE_TASKS": old.prefix_task_cols.mean(0, keepdim=True),
        "EXACT_SOURCE_TASK": old.prefix_task_cols[1:2],
    }.items():
        options = {
            "prompt_tuning_init": start,
            "prompt_tuning_init_state_dict_path": path,
            "prompt_tuning_init_task": 1,
        }
        new = prompted("MultitaskPromptTuningConfig", copy.deepcopy(base), num_ranks=2, **options)
        encoder = new.prompt_encoder["default"]
        assert torch.equal(encoder.prefix_task_cols, expected)
        assert torch.equal(encoder.embedding.weight, old.embedding.weight)


def test_multitask_prompts_need_task_ids() -> None:
    with pytest.raises(fl.UnsupportedError, match="task_ids"):
        prompted("MultitaskPromptTuningConfig")(input_ids=IDS)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_gradient_checkpointing_gives_the_same_gradients(kind: str) -> None:
    base = models.llama()
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = prompted(kind, copy.deepcopy(base)).train()
        if checkpointed:
            enable_checkpointing(model.get_base_model(), {"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_prefix_refuses_gradient_checkpointing_instead_of_being_dropped() -> None:
    base = models.llama()
    model = prompted("PrefixTuningConfig", base)
    enable_checkpointing(base, {"use_reentrant": False})
    with pytest.raises(fl.UnsupportedError, match="gradient checkpointing"):
        model.train()(input_ids=IDS)
    with pytest.raises(fl.UnsupportedError, match="gradient checkpointing"):
        prompted("PrefixTuningConfig", base.train())


@pytest.mark.parametrize("maker", [models.bert_classifier, models.bert_tagger, models.bert_reader])
def test_p_tuning_v2_trains_a_head_with_its_prefix(maker: Any, tmp_path: Path) -> None:
    task = {models.bert_classifier: "SEQ_CLS", models.bert_tagger: "TOKEN_CLS", models.bert_reader: "QUESTION_ANS"}[
        maker
    ]
    base = maker()
    model = prompted("PrefixTuningConfig", copy.deepcopy(base), task_type=task).train()
    labels = {
        "SEQ_CLS": {"labels": torch.tensor([0, 2])},
        "TOKEN_CLS": {"labels": IDS % 3},
        "QUESTION_ANS": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    }[task]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, **labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    again = fl.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(models.logits(again), models.logits(model))


def test_positions_of_answers_move_on_by_the_tokens() -> None:
    base = models.bert_reader()
    model = prompted("PromptTuningConfig", copy.deepcopy(base), task_type="QUESTION_ANS").eval()
    spans = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    output = model(input_ids=IDS, **spans)
    expected = nn.functional.cross_entropy(output.start_logits, spans["start_positions"] + 3)
    expected = (expected + nn.functional.cross_entropy(output.end_logits, spans["end_positions"] + 3)) / 2
    torch.testing.assert_close(output.loss, expected)


def test_virtual_tokens_go_with_lora_in_one_model() -> None:
    model = fl.get_peft_model(models.llama(), CASES["LoRA"].ours())
    model.add_adapter("tokens", fl.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    model.set_adapter(["default", "tokens"])
    perturb(model)
    assert models.logits(model).shape[1] == 9
    model.set_adapter("default")
    assert models.logits(model).shape[1] == 6
    model.delete_adapter("tokens")
    assert "tokens" not in model.prompt_encoder


def test_two_adapters_with_tokens_cannot_be_active_together() -> None:
    model = prompted()
    model.add_adapter("b", fl.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(fl.UnsupportedError, match="only one adapter with virtual tokens"):
        model.set_adapter(["default", "b"])
    with pytest.raises(fl.UnsupportedError, match="no place in a weight"):
        model.merge_adapter()


def test_tokens_that_do_not_fit_are_refused_with_both_shapes(tmp_path: Path) -> None:
    prompted().save_pretrained(tmp_path)
    with pytest.raises(fl.ShapeError, match=r"the file has \[3, 32\], the model has \[5, 32\]"):
        prompted(num_virtual_tokens=5).load_adapter(tmp_path, "default")


def test_a_packed_base_takes_tokens_in_16_bits() -> None:
    model = prompted(base=base_of("nf4+dq").to(torch.bfloat16))
    assert models.logits(model).dtype == torch.bfloat16
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.dtype == torch.float32
