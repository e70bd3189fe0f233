"""`ferrolora doctor`: versions, processor, GPUs, compiler, and what is missing with the command that mends it."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
import typer

from ferrolora.bench.machine import machine
from ferrolora.cli.console import print_json, print_table
from ferrolora.cuda import device, jit

PACKAGES = {  # package -> the extra that brings it, "" for those that ferrolora always brings
    "torch": "",
    "numpy": "",
    "safetensors": "",
    "transformers": "",
    "accelerate": "train",
    "matplotlib": "train",
    "typer": "cli",
    "rich": "cli",
}
PEERS = ("peft", "bitsandbytes", "trl", "diffusers", "triton")  # never needed; shown because they come up in reports


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON.")] = False,
) -> None:
    """Say what this machine has, what is missing and how to get it. Needs no GPU."""
    content = examine()
    if as_json:
        print_json(content)
    else:
        _print(content)


def examine() -> dict[str, Any]:
    """Everything that a report of a problem should begin with.

    Returns: `{"ferrolora", "python", "cpu", "versions", "gpu", "compiler", "missing"}`. missing holds one sentence for
    each thing that is absent or unusable, each with its mend; on a machine without a GPU that is nothing of CUDA.
    """
    about = machine(torch.get_num_threads())
    gpu, compiler = device.describe(), jit.describe()
    missing = [
        f"{name} is not installed: pip install 'ferrolora{f'[{extra}]' if extra else ''}'"
        for name, extra in PACKAGES.items()
        if _version(name) is None
    ]
    if gpu["driver"] is not None:  # without a driver there is no GPU to prepare for
        missing += gpu["missing"] + compiler["missing"]
    return {
        "ferrolora": about["versions"]["ferrolora"],
        "python": about["python"],
        "cpu": {
            "model": about["cpu"],
            "instruction_sets": about["available_isas"],
            "in_use": about["ferrolora_isa"],
            "cores": os.cpu_count(),
            "threads": about["threads"],
        },
        "versions": {name: found for name in (*PACKAGES, *PEERS) if (found := _version(name))},
        "gpu": gpu,
        "compiler": compiler,
        "missing": missing,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(content: dict[str, Any]) -> None:
    cpu, gpu, compiler = content["cpu"], content["gpu"], content["compiler"]
    rows = [
        ("ferrolora", f"{content['ferrolora']} on Python {content['python']}"),
        ("processor", cpu["model"]),
        ("kernels", f"{cpu['in_use']} (this machine has {', '.join(cpu['instruction_sets'])})"),
        ("threads", f"{cpu['threads']} of {cpu['cores']} cores"),
        ("packages", ", ".join(f"{name} {found}" for name, found in content["versions"].items())),
        ("driver", f"CUDA {gpu['driver']}" if gpu["driver"] else f"none: {'; '.join(gpu['missing'])}"),
        *((f"cuda:{i}", _line(row)) for i, row in enumerate(gpu["devices"])),
        ("torch", f"built for CUDA {gpu['torch_cuda']}" if gpu["torch_cuda"] else "built without CUDA"),
        ("nvrtc", compiler["nvrtc"] or "missing"),
        ("cache", f"{compiler['cache']} ({compiler['cached']} kernels)"),
    ]
    print_table(rows, ("what", "here"), left=2)
    print("\nnothing is missing" if not content["missing"] else "\nmissing:")
    for sentence in content["missing"]:
        print(f"  {sentence}")


def _line(row: dict[str, Any]) -> str:
    return f"{row['name']}, compute capability {device.dotted(row['sm'])}, {row['multiprocessors']} multiprocessors"
