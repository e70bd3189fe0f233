"""Examples to token ids and labels: what the loss counts, what is cut, how a batch is padded."""

import pytest
import torch

from ferrolora.errors import FormatError
from ferrolora.train.data import Conversation, Document, LabelledText, PlainText, Segment
from ferrolora.train.tokenize import IGNORED, PadCollator, tokenize_causal, tokenize_classification
from tiny.folders import tokenizer

END = 0


def text_of(ids: list[int]) -> str:
    return tokenizer().decode(ids).replace("<end>", "$")


def trained(example: dict[str, list[int]]) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(example["input_ids"], example["labels"], strict=True))
    return text_of([label for label in example["labels"] if label != IGNORED])


def test_a_text_is_trained_whole_with_its_end() -> None:
    (example,) = tokenize_causal([Document((Segment("hello", True),))], tokenizer(), 32).examples
    assert trained(example) == "hello$"


def test_only_the_completion_and_its_end_are_trained_after_a_prompt() -> None:
    (example,) = tokenize_causal([Document((Segment("ask ", False), Segment("yes", True)))], tokenizer(), 32).examples
    assert text_of(example["input_ids"]) == "ask yes$"
    assert trained(example) == "yes$"


def test_only_the_assistants_turns_are_trained_in_a_conversation() -> None:
    turns = [("user", "q"), ("assistant", "a one"), ("user", "more"), ("assistant", "a two")]
    chat = Conversation(tuple({"role": role, "content": text} for role, text in turns), "x.jsonl:1")
    (example,) = tokenize_causal([chat], tokenizer(), 64).examples
    assert text_of(example["input_ids"]) == "u:q\na:a one\nu:more\na:a two\n"
    assert trained(example) == "a one\na two\n"


def test_messages_without_a_chat_template_are_refused_by_place() -> None:
    plain = tokenizer()
    plain.chat_template = None
    chat = Conversation(({"role": "assistant", "content": "a"},), "x.jsonl:7")
    with pytest.raises(FormatError, match=r"x\.jsonl:7: 'messages' need a tokenizer with a chat template"):
        tokenize_causal([chat], plain, 64)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    odd = tokenizer()
    odd.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = tuple({"role": role, "content": "t"} for role in ("user", "assistant"))
    with pytest.raises(FormatError, match="rewrites earlier turns"):
        tokenize_causal([Conversation(turns, "x.jsonl:1")], odd, 64)


def test_a_plain_text_is_cut_into_blocks_that_join_to_it() -> None:
    text = "abcdefghijklmnopqrstuvwxyz" * 3
    blocks = tokenize_causal([PlainText(text)], tokenizer(), 10).examples
    assert [len(block["input_ids"]) for block in blocks] == [10] * 7 + [8]
    assert "".join(text_of(block["input_ids"]) for block in blocks) == text
    assert all(block["labels"] == block["input_ids"] for block in blocks)


def test_what_is_cut_and_what_is_left_out_is_counted() -> None:
    examples = [
        Document((Segment("short", True),)),
        Document((Segment("p", False), Segment("long completion", True))),
        Document((Segment("a prompt that fills it", False), Segment("c", True))),
    ]
    data = tokenize_causal(examples, tokenizer(), 8)
    assert (len(data), data.truncated, data.dropped) == (2, 2, 1)
    assert all(len(example["input_ids"]) <= 8 for example in data.examples)


def test_data_with_nothing_left_to_train_on_is_refused() -> None:
    with pytest.raises(FormatError, match="--max-length 4"):
        tokenize_causal([Document((Segment("prompt", False), Segment("c", True)))], tokenizer(), 4)


def test_labels_become_their_position_among_the_names() -> None:
    data = tokenize_classification([LabelledText("abc", "b"), LabelledText("abcdef", "a")], ["a", "b"], tokenizer(), 4)
    assert [example["labels"] for example in data.examples] == [1, 0]
    assert [len(example["input_ids"]) for example in data.examples] == [3, 4]
    assert data.truncated == 1


def test_a_label_that_training_did_not_have_is_named() -> None:
    with pytest.raises(FormatError, match=r"label 'c' \(text 'abc'\) is not one of \['a', 'b'\]"):
        tokenize_classification([LabelledText("abc", "c")], ["a", "b"], tokenizer(), 8)


def test_a_batch_is_padded_on_the_right_and_padding_is_neither_seen_nor_trained() -> None:
    batch = PadCollator(9)([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, IGNORED, IGNORED]]


def test_class_labels_are_a_vector() -> None:
    batch = PadCollator(0)([{"input_ids": [1], "labels": 2}, {"input_ids": [1, 1], "labels": 0}])
    assert torch.equal(batch["labels"], torch.tensor([2, 0]))
