"""Peak memory while `from_pretrained` quantizes a model, against what the model then holds.

    python benches/python/load_memory.py [--out benches/results]

A float32 model of about 230 MB is saved once, in shards, and loaded in fresh processes: in float, and quantized to NF4.
Measured is anonymous memory (RssAnon of /proc), read by a thread every millisecond: pages of the mapped checkpoint file
can be dropped by the system at any time and are not counted. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch

from ferrolora.bench.machine import machine

SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "vocab_size": 4096}


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status has no RssAnon: this bench runs on Linux")


class Peak:
    """The most anonymous memory seen inside a `with` block, above what there was before it."""

    def __enter__(self) -> Peak:
        self.before = self.most = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.after = anonymous_bytes()


def save(folder: str, **smaller: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(num_attention_heads=16, **SIZES | smaller)).save_pretrained(
        folder, max_shard_size="50MB"
    )


def load(folder: str, quantized: bool) -> dict[str, int]:
    from transformers import AutoModelForCausalLM

    import ferrolora as fl
    from ferrolora.train.memory import base_memory

    options = {"quantization_config": fl.FerroloraConfig()} if quantized else {}
    with tempfile.TemporaryDirectory() as tiny:  # what the first load imports and starts is not the model's
        save(tiny, hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64)
        AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, **options)
    with Peak() as peak:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    largest = max(p.numel() * 4 for p in AutoModelForCausalLM.from_config(model.config).to("meta").parameters())
    return {
        "model_bytes": base_memory(model).after,
        "peak_bytes": peak.most - peak.before,
        "held_bytes": peak.after - peak.before,
        "largest_float_tensor_bytes": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        folder, kind = arguments.worker
        print(json.dumps(load(folder, quantized=kind == "nf4")))
        return
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        rows = {}
        for kind in ("float", "nf4"):
            command = [sys.executable, __file__, "--worker", folder, kind]
            rows[kind] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            row = {name: f"{count / 1e6:.1f} MB" for name, count in rows[kind].items()}
            print(kind, ", ".join(f"{name} {size}" for name, size in row.items()))
    if arguments.out is not None:
        content = {"machine": machine(torch.get_num_threads()), "model": SIZES, "rows": rows}
        (arguments.out / "load_memory.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
