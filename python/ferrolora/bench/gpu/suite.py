"""Measure every work of the table on the current GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ferrolora.bench.gpu import layer, products, train
from ferrolora.bench.gpu.goals import OURS, Work, works
from ferrolora.bench.gpu.peers import failure
from ferrolora.bench.gpu.row import GpuRow

MEASURES: dict[str, Callable[[Work], GpuRow]] = {
    "dequantize": products.measure_dequantize,
    "gemv": products.measure_product,
    "gemm": products.measure_product,
    "saved": layer.measure_saved,
    "host": layer.measure_host,
    "step": layer.measure_step,
}
UNITS = {"saved": "bytes"}


def rows() -> Iterator[GpuRow]:
    """Every work of the table, measured; one that fails is a row that says why, and the next is measured."""
    planned = works()
    (time,), (memory,) = ([w for w in planned if w.group == group] for group in ("train", "train-memory"))
    for work in planned:
        if work is time:
            yield from train.measure_train(time, memory)
        elif work is not memory:
            yield measured(work, MEASURES[work.group])


def measured(work: Work, measure: Callable[[Work], GpuRow]) -> GpuRow:
    """One row. A measurement takes minutes of a rented machine: an error is kept in the row, not lost with the rest."""
    try:
        return measure(work)
    except Exception as error:  # noqa: BLE001  # reported by `failures`, which fails the command
        return GpuRow(work, UNITS.get(work.group, "s"), {}, notes={OURS: failure(error)})


def failures(found: Sequence[GpuRow]) -> list[str]:
    """One sentence for each row in which ours has no value."""
    return [f"{row.work.name}: {row.notes[OURS]}" for row in found if row.is_failed]
