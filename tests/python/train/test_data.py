"""Training files to examples: every form that is read, and every form that is refused with its file and line."""

from pathlib import Path

import pytest

from ferrolora.errors import FormatError
from ferrolora.train.data import (
    Conversation,
    Document,
    LabelledText,
    PlainText,
    Segment,
    detect_task,
    label_names,
    read_causal,
    read_classification,
    split,
    split_causal,
)


def write(tmp_path: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def test_csv_with_a_quoted_comma_and_a_line_break_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'label,text,other\n1,"one, two",x\nno,"a\nb",y\n')
    assert read_classification(path) == [LabelledText("one, two", "1"), LabelledText("a\nb", "no")]


def test_label_text_lines_are_split_at_the_first_space(tmp_path: Path) -> None:
    path = write(tmp_path, "a.all", "4 Which city ?\n\n0 How so ?\n")
    assert read_classification(path) == [LabelledText("Which city ?", "4"), LabelledText("How so ?", "0")]


def test_a_latin_1_file_is_read_with_its_encoding_and_refused_without(tmp_path: Path) -> None:
    path = write(tmp_path, "a.all", "1 fine\n4 sister\xf0city\n", "latin-1")
    assert read_classification(path, "latin-1")[1].text == "sister\xf0city"
    with pytest.raises(FormatError, match=r"a\.all:2: byte 0xf0 is not utf-8; .*--encoding latin-1"):
        read_classification(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text\nx\n", r"a\.csv:1: has no column \['label'\]"),
        ("a.csv", "text,label\n,1\n", r"a\.csv:2: 'text' should be a non-empty string"),
        ("a.csv", "text,label\nx,\n", r"a\.csv:2: 'label' is missing"),
        ("a.csv", "text,label\n", "holds no examples"),
        ("a.all", "1 x\nalone\n", r"a\.all:2: 'text' should be"),
        ("a.jsonl", '{"text": "x"}\n', r"a\.jsonl:1: 'label' is missing"),
    ],
)
def test_labelled_data_of_another_form_is_refused_by_file_and_line(
    tmp_path, name: str, text: str, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        read_classification(write(tmp_path, name, text))


def test_jsonl_lines_may_hold_text_prompts_or_messages(tmp_path: Path) -> None:
    messages = '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    path = write(
        tmp_path,
        "a.jsonl",
        f'{{"text": "t"}}\n{{"prompt": "p", "completion": "c"}}\n\n{{"messages": {messages}}}\n',
    )
    text, pair, chat = read_causal(path)
    assert text == Document((Segment("t", True),))
    assert pair == Document((Segment("p", False), Segment("c", True)))
    assert isinstance(chat, Conversation)
    assert chat.place.endswith("a.jsonl:4")


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    assert read_causal(write(tmp_path, "a.txt", "once\nupon")) == [PlainText("once\nupon")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:1: not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"question": "q"}', r"needs 'text', 'messages', or 'prompt' and 'completion'; has \['question'\]"),
        ('{"prompt": "p", "completion": ""}', "nothing to train on"),
        ('{"text": 3}', "'text' should be a string, got int"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": [{"role": "user"}]}', "'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "no message of the role 'assistant'"),
    ],
)
def test_a_jsonl_line_of_another_form_is_refused(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_causal(write(tmp_path, "a.jsonl", line + "\n"))


@pytest.mark.parametrize(
    ("name", "text", "task"),
    [
        ("a.csv", "text,label\n", "classification"),
        ("a.jsonl", '{"text": "t", "label": 1}\n', "classification"),
        ("a.jsonl", '{"text": "t"}\n', "causal"),
        ("a.txt", "t", "causal"),
    ],
)
def test_the_task_follows_from_the_file(tmp_path: Path, name: str, text: str, task: str) -> None:
    assert detect_task(write(tmp_path, name, text)) == task


def test_a_suffix_that_tells_no_task_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="say --task classification"):
        detect_task(tmp_path / "TREC.all")


def test_labels_that_are_numbers_are_in_numeric_order() -> None:
    assert label_names([LabelledText("t", name) for name in ("10", "9", "10")]) == ["9", "10"]
    assert label_names([LabelledText("t", name) for name in ("no", "10", "9")]) == ["10", "9", "no"]


def test_a_split_holds_each_item_once_and_depends_on_the_seed_alone() -> None:
    items = list(range(20))
    train, held_out = split(items, 0.25, seed=3)
    assert len(held_out) == 5
    assert sorted(train + held_out) == items
    assert split(items, 0.25, seed=3) == (train, held_out)
    assert split(items, 0.25, seed=4) != (train, held_out)


def test_a_plain_text_is_cut_at_its_end() -> None:
    assert split_causal([PlainText("abcdefghij")], 0.2, seed=0) == ([PlainText("abcdefgh")], [PlainText("ij")])


def test_one_example_cannot_be_split() -> None:
    with pytest.raises(FormatError, match="give evaluation data"):
        split([1], 0.5, seed=0)
