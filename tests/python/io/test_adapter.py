"""The files of an adapter directory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import ferrolora as fl
from ferrolora.io import adapter
from ferrolora.io.hub import local_directory


def test_config_has_two_space_indent_and_sorted_keys(tmp_path: Path) -> None:
    adapter.write_config(tmp_path, {"r": 8, "bias": "none"})
    assert (tmp_path / "adapter_config.json").read_text() == '{\n  "bias": "none",\n  "r": 8\n}'


def test_tensors_are_written_with_the_metadata_that_transformers_asks_for(tmp_path: Path) -> None:
    adapter.write_adapter(tmp_path, {"r": 1}, {"a": torch.ones(2)})
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shared_and_non_contiguous_tensors_are_written_as_they_read(tmp_path: Path) -> None:
    base = torch.arange(6.0).view(2, 3)
    adapter.write_adapter(tmp_path, {}, {"a": base, "b": base.T, "c": base[1]})
    read = adapter.read_tensors(tmp_path)
    assert torch.equal(read["a"], base)
    assert torch.equal(read["b"], base.T)
    assert torch.equal(read["c"], base[1])


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapter.replace_file(path, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_an_older_pickled_adapter_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "adapter_model.bin")
    assert torch.equal(adapter.read_tensors(tmp_path)["a"], torch.ones(2))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(fl.FormatError, match=r"adapter_config\.json does not exist"):
        adapter.read_config(tmp_path)
    with pytest.raises(fl.FormatError, match=r"holds no adapter_model\.safetensors"):
        adapter.read_tensors(tmp_path)


@pytest.mark.parametrize(("text", "complaint"), [("{", "is not JSON"), ("[]", "must hold a JSON object, not a list")])
def test_a_broken_config_is_refused_with_its_path(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(fl.FormatError, match=complaint):
        adapter.read_config(tmp_path)


def test_unknown_config_keys_are_dropped_with_one_warning_that_lists_them(tmp_path: Path) -> None:
    fl.LoraConfig(r=3, target_modules=["q"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"zebra": 1, "aardvark": 2}))
    with pytest.warns(UserWarning, match="dropped: aardvark, zebra") as caught:
        config = fl.PeftConfig.from_pretrained(tmp_path)
    assert len(caught) == 1
    assert isinstance(config, fl.LoraConfig)
    assert config.r == 3


def test_a_config_without_a_method_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(fl.FormatError, match="has no 'peft_type'"):
        fl.PeftConfig.from_pretrained(tmp_path)


def test_a_config_of_a_method_that_is_not_implemented_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "VERA"}')
    with pytest.raises(fl.UnsupportedError, match="'VERA' is not supported; choose one of LORA"):
        fl.PeftConfig.from_pretrained(tmp_path)


def test_a_model_card_names_base_method_and_library() -> None:
    card = adapter.model_card({"peft_type": "LORA", "base_model_name_or_path": "me/base", "task_type": "CAUSAL_LM"})
    head = card.split("---")[1]
    assert "base_model: me/base" in head
    assert "library_name: peft" in head
    assert "- base_model:adapter:me/base" in head
    assert "pipeline_tag: text-generation" in head


def test_a_model_card_that_somebody_wrote_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    adapter.write_card(tmp_path, {"peft_type": "LORA"})
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(fl.UnsupportedError, match="is a file"):
        adapter.write_config(tmp_path / "file", {})


@pytest.mark.parametrize("name", ["./no/such/directory", "directory", "/nowhere", "a/b/c"])
def test_a_name_that_is_no_directory_and_no_repository_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(fl.FormatError, match="neither a directory nor a repository"):
        local_directory(name)
