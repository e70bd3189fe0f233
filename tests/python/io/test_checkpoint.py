"""Safetensors files written tensor by tensor, and model directories read lazily."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ferrolora.errors import FormatError
from ferrolora.io.checkpoint import Checkpoint, SafetensorsWriter, copy_side_files, write_json
from ferrolora.io.shard import DTYPE_NAMES, TensorInfo


def filled(info: TensorInfo, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2, (info.nbytes,), generator=generator, dtype=torch.uint8)
    return raw.view(info.dtype).reshape(info.shape)


infos = st.builds(
    TensorInfo,
    st.sampled_from(sorted(DTYPE_NAMES, key=str)),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
)


@settings(max_examples=50, deadline=None)
@given(
    layout=st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda s: s != "__metadata__"), infos), data=st.data()
)
def test_what_is_written_in_any_order_is_read_back_by_safetensors_itself(tmp_path_factory, layout, data) -> None:
    file = tmp_path_factory.mktemp("writer") / "x.safetensors"
    tensors = {name: filled(info, seed) for seed, (name, info) in enumerate(layout.items())}
    with SafetensorsWriter(file, layout) as writer:
        for name in data.draw(st.permutations(sorted(layout))):
            writer.write(name, tensors[name])
    read = load_file(file)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert read[name].shape == tensor.shape
        assert read[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))


def test_vectors_of_unknown_length_stand_at_the_end_and_everything_is_aligned(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    layout = {"half": TensorInfo(torch.float16, (3,)), "byte": TensorInfo(torch.uint8, (5,))}
    layout["single"] = TensorInfo(torch.float32, (2,))
    with SafetensorsWriter(file, layout, open_ended=["state", "empty"]) as writer:
        writer.write("state", torch.arange(7, dtype=torch.uint8))
        for name, info in layout.items():
            writer.write(name, filled(info))
        writer.write("empty", torch.empty(0, dtype=torch.uint8))
    raw = file.read_bytes()
    (room,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + room])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, entry in header.items():
        width = layout[name].dtype.itemsize if name in layout else 1
        assert (8 + room + entry["data_offsets"][0]) % width == 0
    assert load_file(file)["state"].tolist() == list(range(7))
    assert len(raw) == 8 + room + max(entry["data_offsets"][1] for entry in header.values())


def test_a_non_contiguous_tensor_is_written_as_its_values(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    with SafetensorsWriter(tmp_path / "x.safetensors", {"w": TensorInfo(torch.float32, (3, 2))}) as writer:
        writer.write("w", tensor)
    assert load_file(tmp_path / "x.safetensors")["w"].equal(tensor)


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"old": torch.ones(2)}, file)
    with pytest.raises(RuntimeError, match="stop"), SafetensorsWriter(file, {"w": TensorInfo(torch.float32, (1,))}):
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert "old" in load_file(file)


def test_a_tensor_that_never_came_is_named_and_no_file_is_left(tmp_path: Path) -> None:
    with (
        pytest.raises(FormatError, match="1 tensors were never written, first 'w'"),
        SafetensorsWriter(tmp_path / "x.safetensors", {"w": TensorInfo(torch.float32, (1,))}),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("other", torch.ones(2), "'other' is not in the layout"),
        ("w", torch.ones(3), r"should be torch.float32 \[2\], got torch.float32 \[3\]"),
        ("w", torch.ones(2, dtype=torch.float16), "got torch.float16"),
        ("open", torch.ones(2), "'open' must be a uint8 vector"),
    ],
)
def test_a_tensor_that_does_not_fit_its_place_is_refused(tmp_path: Path, name: str, tensor, message: str) -> None:
    layout = {"w": TensorInfo(torch.float32, (2,))}
    with pytest.raises(FormatError, match=message), SafetensorsWriter(tmp_path / "x", layout, ["open"]) as writer:
        writer.write(name, tensor)


def test_a_tensor_written_twice_is_refused(tmp_path: Path) -> None:
    layout = {"w": TensorInfo(torch.float32, (2,)), "v": TensorInfo(torch.float32, (2,))}
    with SafetensorsWriter(tmp_path / "x", layout) as writer:
        for name in layout:
            writer.write(name, torch.ones(2))
        with pytest.raises(FormatError, match="'w' was written already"):
            writer.write("w", torch.ones(2))


def sharded(directory: Path, weight_map: dict[str, str]) -> Path:
    for shard in set(weight_map.values()):
        names = [name for name, home in weight_map.items() if home == shard]
        save_file({name: torch.full((2,), float(len(name))) for name in names}, directory / Path(shard).name)
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})
    return directory


def test_a_sharded_directory_is_read_through_its_index(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path, {"a": "1.safetensors", "bb": "2.safetensors", "ccc": "2.safetensors"}))
    assert checkpoint.tensors["bb"] == TensorInfo(torch.float32, (2,))
    assert checkpoint.names_in(tmp_path / "2.safetensors") == ["bb", "ccc"]
    assert checkpoint.nbytes == 24
    with checkpoint.reading() as reader:
        assert reader["ccc"].tolist() == [3.0, 3.0]


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"2\.safetensors is missing"):
        Checkpoint(tmp_path)


def test_an_index_that_points_out_of_its_directory_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "../1.safetensors"})
    with pytest.raises(FormatError, match="outside of its directory"):
        Checkpoint(tmp_path)


def test_a_pickled_model_is_read_without_running_its_code(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(5).t()}
    torch.save(tensors | {"c": tensors["a"].T}, tmp_path / "pytorch_model.bin")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors["c"] == TensorInfo(torch.bfloat16, (4, 3))
    with checkpoint.reading() as reader:
        assert torch.equal(reader["a"], tensors["a"])
        assert torch.equal(reader["c"], tensors["a"].T)


@pytest.mark.parametrize("content", [{"a": Path("x")}, {"a": 3}, [torch.zeros(1)], None], ids=str)
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: "):
        Checkpoint(tmp_path)


def test_an_unreadable_pickle_gets_the_advice_that_mends_it(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match="save it again with save_pretrained"):
        Checkpoint(tmp_path)
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="save it again with save_pretrained"):
        Checkpoint(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(FormatError, match=r"model\.safetensors: not a readable safetensors file"):
        Checkpoint(tmp_path)


def test_side_files_are_copied_without_weights_config_and_indexes(tmp_path: Path) -> None:
    source, destination = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    destination.mkdir()
    for name in (
        "tokenizer.json",
        "vocab.txt",
        "config.json",
        "x.safetensors",
        "p.bin",
        "model.safetensors.index.json",
    ):
        (source / name).write_text("{}")
    copy_side_files(source, destination)
    assert sorted(path.name for path in destination.iterdir()) == ["tokenizer.json", "vocab.txt"]
