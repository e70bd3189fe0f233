"""Compiles a CUDA kernel with the C++ compiler and runs it on the CPU, with every access checked (`cuda/host`)."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "cuda"
CACHE = ROOT / "target" / "kernels"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-w"]
MESSAGE_SIZE = 1024


class EmulationError(Exception):
    """What the emulator found wrong: the kernel, the block, the thread and the reason."""


@dataclass(frozen=True)
class Out:
    """An argument that the kernel may write to."""

    tensor: Tensor


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("host", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("writable", ctypes.c_int),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_int * 3),
        ("threads", ctypes.c_int),
        ("dynamic_shared", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_int),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_uint64),
    )


@functools.cache
def compiler() -> str:
    """The C++ compiler: $CXX, c++ or g++."""
    for name in (os.environ.get("CXX"), "c++", "g++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("the kernel tests need a C++17 compiler: install g++, or name one in CXX")


def _build(arguments: list[str], output: Path) -> Path:
    """Runs the compiler unless the output exists; the name holds a hash of all it is made of."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = output.with_suffix(f".{os.getpid()}")
        command = [compiler(), *FLAGS, *arguments, "-o", str(temporary)]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{finished.stderr}")
        temporary.replace(output)
    return output


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@functools.cache
def _host() -> tuple[Path, ...]:
    """The emulator's own object files."""
    headers = "".join(path.read_text() for path in sorted((CUDA / "host").glob("*.h")))
    sources = sorted((CUDA / "host").glob("*.cpp"))
    key = _digest(headers, compiler(), *FLAGS)
    return tuple(
        _build(["-c", str(path)], CACHE / f"{path.stem}-{_digest(key, path.read_text())}.o") for path in sources
    )


@functools.cache
def _headers() -> str:
    return "".join(path.read_text() for path in sorted([*CUDA.rglob("*.cuh"), *CUDA.rglob("*.h")]))


def source_of(file: str) -> str:
    """The text of a kernel file."""
    return (CUDA / file).read_text()


class Kernel:
    """One specialization of one entry point.

    Args:
        file: kernel file in `cuda/`.
        entry: name of the entry point.
        constants: macro -> value.
        source: text to compile instead of the file's, for tests that break it.
    """

    def __init__(self, file: str, entry: str, constants: dict[str, Any], source: str | None = None) -> None:
        text = source_of(file) if source is None else source
        text += f'\n#include "host/launch.h"\nEMULATE({entry})\n'
        macros = [f"-D{name}={value}" for name, value in sorted(constants.items())]
        key = _digest(text, _headers(), compiler(), *FLAGS, *macros, *map(str, _host()))
        unit = CACHE / f"{entry}-{key}.cpp"
        CACHE.mkdir(parents=True, exist_ok=True)
        unit.write_text(text)
        arguments = ["-shared", f"-I{CUDA}", *macros, str(unit), *map(str, _host())]
        self.entry = entry
        self.library = ctypes.CDLL(str(_build(arguments, unit.with_suffix(".so"))))
        signature = getattr(self.library, f"signature_{entry}")
        signature.restype = ctypes.c_char_p
        self.signature: str = signature().decode()

    def __call__(self, grid: tuple[int, int, int], threads: int, *args: Any, shared: int = 0, seed: int = 0) -> None:
        """Launches it. Arguments: a tensor (read only), `Out`, None (a null pointer), an int or a float.

        Raises:
            EmulationError: the kernel did what it must not.
        """
        if len(args) != len(self.signature):
            raise TypeError(f"{self.entry} takes {len(self.signature)} arguments ({self.signature}), not {len(args)}")
        buffers: list[_Buffer] = []
        slots = [self._slot(kind, arg, buffers) for kind, arg in zip(self.signature, args, strict=True)]
        message = ctypes.create_string_buffer(MESSAGE_SIZE)
        launch = _Launch(
            kernel=self.entry.encode(),
            grid=(ctypes.c_int * 3)(*grid),
            threads=threads,
            dynamic_shared=shared,
            seed=seed,
            buffers=(_Buffer * max(1, len(buffers)))(*buffers),
            buffer_count=len(buffers),
            message=ctypes.cast(message, ctypes.c_char_p),
            message_size=MESSAGE_SIZE,
        )
        pointers = (ctypes.c_void_p * len(slots))(*(ctypes.addressof(slot) for slot in slots))
        if getattr(self.library, f"emulate_{self.entry}")(ctypes.byref(launch), pointers):
            raise EmulationError(message.value.decode())

    def _slot(self, kind: str, arg: Any, buffers: list[_Buffer]) -> Any:
        """The argument as the kernel takes it; a tensor becomes a token for the emulator's memory."""
        if kind != "p":
            return {"q": ctypes.c_int64, "u": ctypes.c_uint32, "f": ctypes.c_float}[kind](arg)
        if arg is None:
            return ctypes.c_void_p(0)
        tensor = arg.tensor if isinstance(arg, Out) else arg
        if not isinstance(tensor, Tensor) or not tensor.is_contiguous() or tensor.device != torch.device("cpu"):
            raise TypeError(f"{self.entry}: a pointer argument must be a contiguous CPU tensor, not {arg!r}")
        name = f"argument {len(buffers) + 1} of type {tensor.dtype}"
        buffers.append(_Buffer(name.encode(), tensor.data_ptr(), tensor.nbytes, isinstance(arg, Out)))
        pointer = self.library.global_pointer
        pointer.restype = ctypes.c_void_p
        return ctypes.c_void_p(pointer(len(buffers) - 1))
