"""Directories that commands read and write: what is read is never lost, what is not there is named."""

from pathlib import Path
from typing import Any

import pytest

import ferrolora as fl
from tiny.folders import save
from tiny.models import llama

COMMANDS: dict[str, list[str]] = {
    "quantize": ["quantize", "model", "link to model"],
    "merge into the model": ["merge", "model", "adapter", "link to model"],
    "merge into the adapter": ["merge", "model", "adapter", "link to adapter"],
    "export an adapter": ["export", "adapter", "adapter", "link to adapter"],
    "train": ["train", "model", "--data", "data.jsonl", "--output", "link to model"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_read_is_never_overwritten(
    command: str, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, adapter = save(llama(), Path("model")), Path("adapter")
    fl.get_peft_model(llama(), fl.LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    Path("data.jsonl").write_text('{"text": "abc"}\n')
    for folder in (model, adapter):
        Path(f"link to {folder}").symlink_to(folder)
    before = {file: file.read_bytes() for folder in (model, adapter) for file in folder.iterdir()}
    outcome = cli(*COMMANDS[command], "--overwrite")
    assert outcome.status == 1
    assert "give another directory" in outcome.err
    assert {file: file.read_bytes() for folder in (model, adapter) for file in folder.iterdir()} == before


def test_a_checkpoint_is_not_exported_onto_itself(cli: Any, tmp_path: Path) -> None:
    save(llama(), tmp_path / "float")
    assert cli("quantize", tmp_path / "float", tmp_path / "nf4").status == 0
    outcome = cli("export", "bitsandbytes", tmp_path / "nf4", tmp_path / "nf4", "--overwrite")
    assert (outcome.status, "give another directory" in outcome.err) == (1, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "nowhere", "out"],
        ["merge", "nowhere", "adapter", "out"],
        ["train", "./nowhere", "--data", "data.jsonl", "--output", "out"],
        ["generate", "./nowhere", "--prompt", "x"],
    ],
)
def test_a_directory_that_is_not_there_is_named_and_not_looked_for_on_the_hub(
    arguments: list[str], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cli(*arguments)
    assert outcome.status == 1
    assert "nowhere: no such directory" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_tokenizer_is_said_to_have_none(cli: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    outcome = cli("generate", tmp_path / "model", "--prompt", "x")
    assert outcome.status == 1
    assert "holds no tokenizer" in outcome.err
