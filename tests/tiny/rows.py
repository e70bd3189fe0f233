"""Rows as a run would give them, with times that are easy to reckon with."""

from __future__ import annotations

from typing import Any

from ferrolora.bench.contender import BITSANDBYTES, COPY, OURS, PEFT, REUSED, TORCH
from ferrolora.bench.row import Entry, Row

MACHINE: dict[str, Any] = {
    "date": "2026-11-21",
    "cpu": "Test CPU",
    "instruction_sets": ["avx2", "avx512_bf16", "avx512f"],
    "available_isas": ["scalar", "avx2", "avx512"],
    "ferrolora_isa": "avx512",
    "cores": 2,
    "threads": 2,
    "omp_wait_policy": "default",
    "python": "3.11.7",
    "load_average": 0.5,
    "versions": {"ferrolora": "9.9.9", "torch": "2.15.0"},
}


def entry(library: str, milliseconds: float, **fields: Any) -> Entry:
    seconds = (milliseconds * 1e-3, milliseconds * 1e-3, milliseconds * 2e-3)
    return Entry(library, True, **{"threads": 2, "seconds": seconds, **fields})


LINEAR = Row(
    "linear",
    "16x4096x4096",
    "float32",
    (
        entry(OURS, 2.0, flops=10**9, bytes=10**7, error=1e-7),
        entry(OURS, 3.0, threads=1),
        Entry(BITSANDBYTES, False, note="y: 3 of 8 values outside the bound", threads=2),
        entry(TORCH, 4.0),
    ),
    TORCH,
)
DEQUANTIZE = Row(
    "dequantize",
    "4096x4096",
    "float32",
    (entry(OURS, 4.0, output=REUSED), entry(OURS, 9.0), entry(COPY, 3.0, output=REUSED), entry(COPY, 6.0)),
    COPY,
)
LORA = Row(
    "lora",
    "512x4096x4096",
    "float32",
    (entry(OURS, 10.0, peak_bytes=40), entry(PEFT, 30.0, peak_bytes=100), entry(TORCH, 9.5, peak_bytes=10)),
    TORCH,
)
TRAIN = Row(
    "train",
    "llama-512",
    "float32",
    (entry(OURS, 100.0, peak_bytes=10**8, model_bytes=10**7), entry(PEFT, 250.0, peak_bytes=2 * 10**8)),
)
ROWS = (LINEAR, DEQUANTIZE, LORA, TRAIN)
