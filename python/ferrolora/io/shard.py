"""One file of weights, read tensor by tensor: safetensors, or what torch.save wrote, both mapped into memory."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ferrolora.errors import FormatError

PICKLED_SUFFIX = ".bin"

# safetensors' names of the types, and the bytes of one element. Source: the safetensors format description.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Type and shape of a stored tensor, known from a file's header without reading its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.numel * self.dtype.itemsize


class Shard(Protocol):
    """An open file of weights."""

    def names(self) -> list[str]:
        """Names of its tensors, in the order of the file."""

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one tensor; its data is not read."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""

    def metadata(self) -> dict[str, str]:
        """The text pairs of the header."""


@contextmanager
def open_shard(file: Path) -> Iterator[Shard]:
    """Open a `.safetensors` file, or a `.bin` file that torch.save wrote; nothing but its header is read.

    Raises:
        FormatError: the file is missing, damaged, holds anything but tensors, or has torch's format from before 1.6.
    """
    if file.suffix == PICKLED_SUFFIX:
        yield _Pickled(file)
        return
    with open_safetensors(file) as handle:
        yield _Safetensors(file, handle)


@contextmanager
def open_safetensors(file: Path) -> Iterator[Any]:
    """`safetensors.safe_open` on the CPU whose errors name the file."""
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file}: not a readable safetensors file: {error}") from error
    with handle as opened:
        yield opened


class _Safetensors:
    def __init__(self, file: Path, handle: Any) -> None:
        self._file, self._handle = file, handle

    def names(self) -> list[str]:
        return list(self._handle.keys())

    def info(self, name: str) -> TensorInfo:
        view = self._handle.get_slice(name)
        stored = view.get_dtype()
        if stored not in DTYPES:
            raise FormatError(f"{self._file}: tensor {name!r} has type {stored}; known are {', '.join(sorted(DTYPES))}")
        return TensorInfo(DTYPES[stored], tuple(view.get_shape()))

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle.get_tensor(name)
        return tensor

    def metadata(self) -> dict[str, str]:
        return self._handle.metadata() or {}


class _Pickled:
    """torch's weights-only unpickler builds tensors and nothing else, and runs no code of the file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            first = str(error).strip().partition("\n")[0]
            raise FormatError(
                f"{file}: torch.load(mmap=True, weights_only=True) does not read it ({first}); "
                "load the model where the file came from and save it again with save_pretrained"
            ) from error
        if not isinstance(content, dict):
            raise FormatError(f"{file}: expected a dict of tensors, got {type(content).__name__}")
        for name, tensor in content.items():
            if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
                raise FormatError(f"{file}: entry {name!r} is of type {type(tensor).__name__}, not a tensor")
            if tensor.dtype not in DTYPE_NAMES or tensor.layout != torch.strided:
                raise FormatError(
                    f"{file}: tensor {name!r} is {tensor.dtype} {tensor.layout}, not a type of safetensors"
                )
        self._tensors: dict[str, torch.Tensor] = content

    def names(self) -> list[str]:
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(tensor.dtype, tuple(tensor.shape))

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def metadata(self) -> dict[str, str]:
        return {}
