"""Time and peak memory of loading a checkpoint of 1.1 B parameters into NF4, beside transformers + bitsandbytes.

    python benches/python/load_memory.py [--out benches/results] [--rounds 3] [--layers 22]

A Llama-shaped checkpoint in bfloat16 with random weights is written once, in shards of 500 MB; then each way loads it
in a process of its own, in turns. Measured are wall time, anonymous memory (RssAnon of /proc, read by a thread every
millisecond) and all resident memory, both above what the process had before; pages of the mapped checkpoint file count
only in the second, since the system can drop them at any time. Linux only; 8 GB of memory and 3 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ferrolora.bench.machine import machine

SIZES = {  # TinyLlama's: 1,100,048,384 parameters
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
SMALLER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
KINDS = ("float", "ferrolora", "bitsandbytes")


def resident_bytes() -> tuple[int, int]:
    """(anonymous, all) resident memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    if "RssAnon" not in fields:
        raise RuntimeError("/proc/self/status has no RssAnon: this bench runs on Linux")
    anonymous, whole = (1024 * int(fields[name].split()[0]) for name in ("RssAnon", "VmRSS"))
    return anonymous, whole


class Peak:
    """The most memory seen inside a `with` block, above what there was before it."""

    def __enter__(self) -> Peak:
        self.before = resident_bytes()
        self.most = list(self.before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._look()

    def _look(self) -> None:
        self.most = [max(most, now) for most, now in zip(self.most, resident_bytes(), strict=True)]

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.held = resident_bytes()[0] - self.before[0]
        self.anonymous, self.resident = (most - was for most, was in zip(self.most, self.before, strict=True))


def save(folder: str, **smaller: int) -> None:
    """Writes a checkpoint with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | smaller, dtype=torch.bfloat16)
    LlamaForCausalLM._from_config(config).save_pretrained(folder, max_shard_size="500MB")


def options_of(kind: str) -> dict[str, Any]:
    """What `from_pretrained` is given: both quantize to NF4 in blocks of 64 with double quantization."""
    from transformers import BitsAndBytesConfig

    import ferrolora as fl

    if kind == "float":
        return {}
    peer = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return {"quantization_config": fl.FerroloraConfig() if kind == "ferrolora" else peer}


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of all tensors, with the scales that bitsandbytes keeps in objects beside its parameters."""
    tensors = [*model.parameters(), *model.buffers()]
    for state in (getattr(parameter, "quant_state", None) for parameter in model.parameters()):
        if state is not None:
            tensors += [state.absmax, *([] if state.state2 is None else [state.state2.absmax])]
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())


def load(folder: str, kind: str) -> dict[str, float]:
    """Loads the checkpoint one way, in this process."""
    from transformers import AutoModelForCausalLM

    options = options_of(kind)
    with tempfile.TemporaryDirectory() as tiny:  # what the first load imports and starts is not the model's
        save(tiny, **SMALLER)
        AutoModelForCausalLM.from_pretrained(tiny, **options)
    with Peak() as peak:
        start = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        seconds = time.perf_counter() - start
    stated = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16).to("meta").parameters()
    return {
        "seconds": seconds,
        "model_bytes": model_bytes(model),
        "peak_bytes": peak.anonymous,
        "peak_resident_bytes": peak.resident,
        "held_bytes": peak.held,
        "largest_float_tensor_bytes": max(p.numel() * 2 for p in stated),
    }


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians of the times, and the largest of everything else."""
    most = {name: max(run[name] for run in runs) for name in runs[0]}
    return {**most, "seconds": statistics.median(run["seconds"] for run in runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(load(*arguments.worker)))
        return
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        save(folder, num_hidden_layers=arguments.layers)
        for _ in range(arguments.rounds):
            for kind in KINDS:
                command = [sys.executable, __file__, "--worker", folder, kind]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[kind].append(json.loads(done.stdout.splitlines()[-1]))  # other libraries print too
    rows = {kind: summary(of_kind) for kind, of_kind in runs.items()}
    for kind, row in rows.items():
        sizes = ", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in row.items() if name != "seconds")
        print(f"{kind}: {row['seconds']:.2f} s, {sizes}")
    if arguments.out is not None:
        model = SIZES | {"num_hidden_layers": arguments.layers}
        content = {
            "machine": machine(torch.get_num_threads()),
            "model": model,
            "rounds": arguments.rounds,
            "rows": rows,
        }
        (arguments.out / "load_memory.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
