"""Training files to examples: classification from csv or label-text lines, causal text from jsonl or plain text."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from ferrolora.errors import FormatError

Task = Literal["causal", "classification"]
TASKS: tuple[Task, ...] = ("causal", "classification")
T = TypeVar("T")


class LabelledText(NamedTuple):
    """One row of classification data; the label is its name as written in the file."""

    text: str
    label: str


class Segment(NamedTuple):
    """A piece of a causal example; the loss counts its tokens only if `trained`."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Document:
    """One causal example made of segments: a text (all trained) or a prompt and its completion."""

    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Conversation:
    """Chat messages `{"role", "content"}`; the assistant's turns are trained, by the tokenizer's chat template."""

    messages: tuple[dict[str, str], ...]
    place: str  # file:line, for errors that only show when the template is applied


@dataclass(frozen=True)
class PlainText:
    """A whole text file, to be cut into blocks of tokens."""

    text: str


CausalExample = Document | Conversation | PlainText


def detect_task(path: Path) -> Task:
    """The task that a file's form implies.

    `.csv` is classification; `.jsonl` is classification if its first line has a `label`, else causal; `.txt` is causal.

    Raises:
        FormatError: any other suffix, since label-text lines cannot be told from plain text.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return "classification"
    if suffix == ".jsonl":
        first = next(_json_lines(path, "utf-8"), None)
        return "classification" if first is not None and "label" in first[1] else "causal"
    if suffix == ".txt":
        return "causal"
    raise FormatError(
        f"{path}: the suffix {suffix!r} does not tell the task; say --task classification (lines of 'LABEL text') "
        "or --task causal (plain text)"
    )


def read_classification(path: Path, encoding: str = "utf-8") -> list[LabelledText]:
    """Read labelled texts.

    Args:
        path: `.csv` with a header naming `text` and `label`; `.jsonl` with those keys; any other suffix: lines of
            `LABEL text`, split at the first space.
        encoding: the file's text encoding, default UTF-8.

    Returns: the rows in file order, at least one.

    Raises:
        FormatError: a row without text or label, a missing column, wrong encoding, or no rows; names file and line.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        rows = list(_csv_rows(path, encoding))
    elif suffix == ".jsonl":
        rows = [_labelled(fields, f"{path}:{line}") for line, fields in _json_lines(path, encoding)]
    else:
        rows = list(_label_lines(path, encoding))
    if not rows:
        raise FormatError(f"{path}: holds no examples")
    return rows


def read_causal(path: Path, encoding: str = "utf-8") -> list[CausalExample]:
    """Read text for next-token training.

    Args:
        path: `.jsonl` whose lines hold `text`, `messages`, or `prompt` and `completion`; any other suffix is one
            plain text.
        encoding: the file's text encoding, default UTF-8.

    Returns: one example a line, or one `PlainText`.

    Raises:
        FormatError: a line of another form, wrong encoding, or no text; names file and line.
    """
    if path.suffix.lower() == ".jsonl":
        examples = [_causal(fields, f"{path}:{line}") for line, fields in _json_lines(path, encoding)]
        if not examples:
            raise FormatError(f"{path}: holds no examples")
        return examples
    text = _read_text(path, encoding)
    if not text.strip():
        raise FormatError(f"{path}: holds no text")
    return [PlainText(text)]


def label_names(rows: Sequence[LabelledText]) -> list[str]:
    """The distinct labels, in numeric order if all are whole numbers, else in alphabetic order."""
    names = {row.label for row in rows}
    numeric = all(name.lstrip("-").isdigit() for name in names)
    return sorted(names, key=int) if numeric else sorted(names)


def split(items: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Set `fraction` of the items (at least one) apart for evaluation, chosen by `seed`; both keep file order."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"eval fraction must lie between 0 and 1, got {fraction}")
    if len(items) < 2:
        raise FormatError(f"{len(items)} example cannot be split into training and evaluation; give evaluation data")
    held_out = set(random.Random(seed).sample(range(len(items)), max(1, round(len(items) * fraction))))
    if len(held_out) == len(items):
        held_out.pop()
    kept = [item for i, item in enumerate(items) if i not in held_out]
    return kept, [item for i, item in enumerate(items) if i in held_out]


def split_causal(
    examples: Sequence[CausalExample], fraction: float, seed: int
) -> tuple[list[CausalExample], list[CausalExample]]:
    """Like `split`, but a plain text is cut once, its end set apart, so that no sentence is on both sides."""
    if len(examples) == 1 and isinstance(examples[0], PlainText):
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"eval fraction must lie between 0 and 1, got {fraction}")
        text = examples[0].text
        cut = round(len(text) * (1 - fraction))
        return [PlainText(text[:cut])], [PlainText(text[cut:])]
    return split(examples, fraction, seed)


def _read_text(path: Path, encoding: str) -> str:
    try:
        return path.read_text(encoding=encoding)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise FormatError(
            f"{path}:{line}: byte {error.object[error.start]:#04x} is not {encoding}; "
            "give the file's encoding, for instance --encoding latin-1"
        ) from error
    except LookupError as error:
        raise FormatError(f"{path}: {encoding!r} is not an encoding Python knows") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}") from error


def _csv_rows(path: Path, encoding: str) -> Iterator[LabelledText]:
    reader = csv.DictReader(_read_text(path, encoding).splitlines(keepends=True))
    missing = {"text", "label"} - set(reader.fieldnames or [])
    if missing:
        raise FormatError(f"{path}:1: has no column {sorted(missing)}; columns are {reader.fieldnames}")
    for row in reader:
        yield _labelled(row, f"{path}:{reader.line_num}")


def _label_lines(path: Path, encoding: str) -> Iterator[LabelledText]:
    # Not splitlines(): that also cuts at characters like U+0085 inside a text.
    for number, line in enumerate(_read_text(path, encoding).split("\n"), start=1):
        if line.strip():
            label, _, text = line.strip().partition(" ")
            yield _labelled({"label": label, "text": text}, f"{path}:{number}")


def _json_lines(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path, encoding).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(fields, dict):
            raise FormatError(f"{path}:{number}: expected a JSON object, got {type(fields).__name__}")
        yield number, fields


def _labelled(fields: dict[str, Any], place: str) -> LabelledText:
    text, label = fields.get("text"), fields.get("label")
    if not isinstance(text, str) or not text.strip():
        raise FormatError(f"{place}: 'text' should be a non-empty string, got {text!r}")
    if label is None or not str(label).strip():
        raise FormatError(f"{place}: 'label' is missing")
    return LabelledText(text.strip(), str(label).strip())


def _causal(fields: dict[str, Any], place: str) -> CausalExample:
    if "messages" in fields:
        return Conversation(_messages(fields["messages"], place), place)
    if "prompt" in fields and "completion" in fields:
        prompt, completion = _text(fields, "prompt", place), _text(fields, "completion", place)
        if not completion:
            raise FormatError(f"{place}: 'completion' is empty, so there is nothing to train on")
        return Document((Segment(prompt, False), Segment(completion, True)))
    if "text" in fields:
        text = _text(fields, "text", place)
        if not text:
            raise FormatError(f"{place}: 'text' is empty")
        return Document((Segment(text, True),))
    raise FormatError(f"{place}: needs 'text', 'messages', or 'prompt' and 'completion'; has {sorted(fields)}")


def _text(fields: dict[str, Any], key: str, place: str) -> str:
    value = fields[key]
    if not isinstance(value, str):
        raise FormatError(f"{place}: {key!r} should be a string, got {type(value).__name__}")
    return value


def _messages(messages: Any, place: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise FormatError(f"{place}: 'messages' should be a non-empty list")
    for message in messages:
        complete = isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        if not complete:
            raise FormatError(f"{place}: each message needs the strings 'role' and 'content', got {message!r}")
    if not any(message["role"] == "assistant" for message in messages):
        raise FormatError(f"{place}: no message of the role 'assistant', so there is nothing to train on")
    return tuple(messages)
