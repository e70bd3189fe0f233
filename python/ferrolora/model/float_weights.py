"""The float weights that a packed model was quantized from, read tensor by tensor from its checkpoint."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from ferrolora.adapters.base import WeightSource
from ferrolora.errors import FormatError
from ferrolora.model.origin import name_or_path

_WHERE = "give the checkpoint the model was quantized from as float_weights=…"


class FloatWeights:
    """Finds the float weight of a module by its path.

    Args:
        model: the model; where it came from is where the weights are looked for by default.
        where: a directory of safetensors files, or a mapping of tensors by name. Default None: where `model` came from.
    """

    def __init__(self, model: nn.Module, where: str | PathLike[str] | Mapping[str, Tensor] | None = None) -> None:
        self._where = where if where is not None else name_or_path(model)
        self._files: dict[str, Path] | None = None

    def source(self, path: str) -> WeightSource:
        """A function that reads the weight of the module at `path` when it is called."""
        return lambda: self.read(f"{path}.weight")

    def read(self, name: str) -> Tensor:
        """The tensor `name`.

        Raises:
            FormatError: nothing says where it is, the directory lacks it, or it is not a float tensor.
        """
        if isinstance(self._where, Mapping):
            if name not in self._where:
                raise FormatError(f"float_weights holds no {name!r}")
            return self._float(name, self._where[name])
        files = self._index()
        found = [key for key in (name, *(key for key in files if name.endswith(f".{key}"))) if key in files]
        if not found:
            raise FormatError(f"{self._where}: holds no tensor {name!r}; {_WHERE}")
        from safetensors import safe_open

        with safe_open(files[found[0]], "pt") as file:
            return self._float(name, file.get_tensor(found[0]))

    def _index(self) -> dict[str, Path]:
        if self._files is None:
            if not self._where or not Path(str(self._where)).is_dir():
                raise FormatError(
                    f"the float weights of this packed model are needed, and it names no folder; {_WHERE}"
                )
            self._files = tensor_files(Path(str(self._where)))
        return self._files

    def _float(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.dim() < 2:
            raise FormatError(f"{self._where}: {name} is {tensor.dtype} {list(tensor.shape)}, already packed; {_WHERE}")
        return tensor


def tensor_files(directory: Path) -> dict[str, Path]:
    """{tensor name: the safetensors file of `directory` that holds it}, by the index if there is one."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    if index.is_file():
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: directory / file for name, file in places.items()}
    found: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found
