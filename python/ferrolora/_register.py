"""Makes ferrolora known to transformers at the moment transformers' quantizer registry is first imported.

`import ferrolora` must stay cheap, so it cannot import that registry (seconds); yet after it, a quantized model saved
before must load by `AutoModel.from_pretrained(directory)` alone. `sys.meta_path` is Python's own hook for this: a
finder that waits for one module, lets the usual machinery load it, registers, and is gone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def install() -> None:
    """Register ferrolora's quantizer with transformers: now if its registry is loaded, else as soon as it is."""
    registry = sys.modules.get(REGISTRY)
    if registry is not None and not getattr(registry.__spec__, "_initializing", False):
        _register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


def _register() -> None:
    importlib.import_module("ferrolora.integrations.transformers")


class _RegisterAfterImport(MetaPathFinder):
    """Waits for the registry's import; any other module is left to the finders behind it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)  # one shot, and find_spec below must not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadThenRegister(spec.loader)
        return spec


class _LoadThenRegister(Loader):
    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own loader: what reads source or resources through it sees nothing of this.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
        _register()
