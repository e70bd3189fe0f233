"""Model directories and the files that we write, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from ferrolora.errors import FormatError
from ferrolora.io.shard import DTYPE_NAMES, Shard, TensorInfo, open_shard

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLED_WEIGHTS_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
WEIGHT_FILES = ((INDEX_NAME, WEIGHTS_NAME), (PICKLED_INDEX_NAME, PICKLED_WEIGHTS_NAME))  # in order of preference
CHECKSUMS_NAME = "SHA256SUMS"  # `sha256sum -c SHA256SUMS` reads it
CONFIG_NAME = "config.json"


class SafetensorsWriter:
    """Writes one `.safetensors` file tensor by tensor: the memory it needs is the tensor being written.

    Layout: `uint64 header length | JSON header, padded with spaces | data`. Room for the header is reserved up front
    and the header is written last, so that tensors whose length is not known beforehand (the JSON text of a
    quantization state) can stand at the end of the data. Tensors may come in any order; each has its place, widest
    type first, so that every tensor is aligned to its own element size.

    The file is written to a temporary sibling and renamed when it is complete: a crash leaves no half of a file.

    Args:
        path: the file to write.
        layout: type and shape of every tensor but the open-ended ones.
        open_ended: names of uint8 vectors whose length is not known yet.
        metadata: text pairs for the header's `__metadata__`; default `{"format": "pt"}`.

    Raises:
        FormatError: a tensor that is unknown, comes twice, has another type or shape, or is missing at the end.

    Source: the safetensors format description, https://github.com/huggingface/safetensors#format
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: Mapping[str, TensorInfo],
        open_ended: Collection[str] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self._metadata = dict(metadata) if metadata is not None else {"format": "pt"}
        self._layout = dict(layout)
        self._open_ended = set(open_ended)
        self._place: dict[str, tuple[int, int]] = {}
        self._written: set[str] = set()
        self._end = 0
        for name in sorted(layout, key=lambda n: (-layout[n].dtype.itemsize, n)):
            self._place[name] = (self._end, self._end + layout[name].nbytes)
            self._end += layout[name].nbytes
        self._header_room = self._bound_of_header()
        self._temporary = temporary_sibling(self.path)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> SafetensorsWriter:
        self._file = self._temporary.open("wb")
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place."""
        if self._file is None:
            raise FormatError(f"{self.path}: write({name!r}) outside of the writer's `with` block")
        if name in self._written:
            raise FormatError(f"{self.path}: tensor {name!r} was written already")
        data = tensor.detach().cpu().contiguous()
        if name in self._open_ended:
            if data.dtype != torch.uint8 or data.dim() != 1:
                raise FormatError(f"{self.path}: {name!r} must be a uint8 vector, got {data.dtype} {list(data.shape)}")
            self._layout[name] = TensorInfo(torch.uint8, tuple(data.shape))
            self._place[name] = (self._end, self._end + data.numel())
            self._end += data.numel()
        elif name not in self._layout:
            raise FormatError(f"{self.path}: tensor {name!r} is not in the layout of this file")
        expected = self._layout[name]
        if (data.dtype, tuple(data.shape)) != (expected.dtype, expected.shape):
            raise FormatError(
                f"{self.path}: tensor {name!r} should be {expected.dtype} {list(expected.shape)}, "
                f"got {data.dtype} {list(data.shape)}"
            )
        self._file.seek(8 + self._header_room + self._place[name][0])
        if data.numel():
            self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._written.add(name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._file is not None
        try:
            if kind is None:
                self._finish(self._file)
        finally:
            self._file.close()
            self._file = None
            if kind is not None or self._written != set(self._layout) | self._open_ended:
                self._temporary.unlink()
        if kind is None:
            self._temporary.replace(self.path)

    def _finish(self, file: IO[bytes]) -> None:
        missing = sorted((set(self._layout) | self._open_ended) - self._written)
        if missing:
            raise FormatError(f"{self.path}: {len(missing)} tensors were never written, first {missing[0]!r}")
        header = self._header(self._place)
        file.seek(0)
        file.write(struct.pack("<Q", self._header_room))
        file.write(header.ljust(self._header_room, b" "))
        file.truncate(8 + self._header_room + self._end)
        file.flush()
        os.fsync(file.fileno())

    def _header(self, place: Mapping[str, tuple[int, int]]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": self._metadata}
        # Readers check that offsets follow each other, so the header lists the tensors in the order of their data.
        for name in sorted(place, key=lambda n: place[n]):
            info = self._layout[name]
            entries[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": list(place[name]),
            }
        return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()

    def _bound_of_header(self) -> int:
        room = len(self._header(self._place))
        for name in self._open_ended:
            # The entry of a uint8 vector, with a length and two offsets of at most 20 digits (64 bits) each.
            entry = {"dtype": "U8", "shape": [10**19], "data_offsets": [10**19, 10**19]}
            room += len(json.dumps({name: entry}, ensure_ascii=False).encode())
        return (room + 7) // 8 * 8  # data starts on 8 bytes, so that every type is aligned


class Checkpoint:
    """The tensors of a model directory (or of one file of weights), read lazily.

    Args:
        path: a directory with `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin` or
            `pytorch_model.bin.index.json` (the first of them that is there), or a `.safetensors` or `.bin` file.

    Raises:
        FormatError: nothing readable there, a shard that the index names is missing, or a damaged header.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.files: list[Path] = _weight_files(self.path)
        self.tensors: dict[str, TensorInfo] = {}
        self.file_of: dict[str, Path] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        for file in self.files:
            with open_shard(file) as shard:
                self.metadata[file] = shard.metadata()
                for name in shard.names():
                    if name in self.file_of:
                        raise FormatError(f"{file}: tensor {name!r} is also in {self.file_of[name].name}")
                    self.tensors[name] = shard.info(name)
                    self.file_of[name] = file

    def names_in(self, file: Path) -> list[str]:
        """The names of the tensors that `file` holds, in the order of its header."""
        return [name for name, home in self.file_of.items() if home == file]

    @contextmanager
    def reading(self) -> Iterator[_Reader]:
        """Open every file once; `reader[name]` then reads one tensor."""
        with ExitStack() as stack:
            yield _Reader(self, {file: stack.enter_context(open_shard(file)) for file in self.files})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())


class _Reader:
    def __init__(self, checkpoint: Checkpoint, shards: Mapping[Path, Shard]) -> None:
        self._checkpoint, self._shards = checkpoint, shards

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._shards[self._checkpoint.file_of[name]].read(name)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from `file`; FormatError naming the file when there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(file: Path, content: Any) -> None:
    """Write `content` as sorted, indented JSON through a temporary sibling."""
    temporary = temporary_sibling(file)
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(file)


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a sharded checkpoint: which shard holds which tensor, and the bytes of all."""
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    write_json(directory / INDEX_NAME, content)


def require_free(destination: Path, overwrite: bool, *sources: Path) -> None:
    """Raises FormatError unless a result may be written to the directory `destination`.

    Args:
        destination: need not exist.
        overwrite: whether it may hold something.
        sources: what the result is made from; the destination must be none of them, since overwriting deletes first.
    """
    for source in sources:
        if destination.resolve() == source.resolve():
            raise FormatError(f"{destination}: is what is read; give another directory for the result")
    if destination.exists() and not destination.is_dir():
        raise FormatError(f"{destination}: is a file, not a directory")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise FormatError(f"{destination}: exists and is not empty; --overwrite replaces the weights and config in it")


def copy_side_files(source: Path, destination: Path) -> None:
    """Copy the files beside the weights (tokenizer, generation config, model card); not weights, not `config.json`."""
    for file in sorted(source.iterdir()):
        is_weights = file.suffix in {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf"}
        if file.is_file() and not is_weights and file.name not in {CONFIG_NAME, INDEX_NAME}:
            if file.name.endswith(".index.json") or file.name.startswith(".") or file.name == CHECKSUMS_NAME:
                continue
            shutil.copyfile(file, destination / file.name)


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal; reads it in pieces of a mebibyte."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_checksums(directory: Path, digests: Mapping[str, str]) -> None:
    """Write SHA256SUMS: one line a file, as the program sha256sum writes and checks them."""
    file = directory / CHECKSUMS_NAME
    temporary = temporary_sibling(file)
    temporary.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())), encoding="utf-8")
    temporary.replace(file)


def temporary_sibling(path: Path) -> Path:
    """A name beside `path` to write to before renaming; the process id keeps two writers apart."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FormatError(f"{path}: no such file or directory")
    for index_name, whole_name in WEIGHT_FILES:
        index, whole = path / index_name, path / whole_name
        if index.is_file():
            return _files_of_index(index)
        if whole.is_file():
            return [whole]
    raise FormatError(f"{path}: holds no weights: none of {', '.join(name for pair in WEIGHT_FILES for name in pair)}")


def _files_of_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"{index}: has no 'weight_map'")
    files = [index.parent / str(name) for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != index.parent:
            raise FormatError(f"{index}: names {str(file)!r} outside of its directory")
        if not file.is_file():
            raise FormatError(f"{index.parent}: {file.name} is missing, which {index.name} names")
    return files
