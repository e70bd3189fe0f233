"""What bounds the targets that were missed: the time they would take at the best rates that the same run measured.

A product does its multiply-adds and moves its least bytes. "Arithmetic" is the time of the first at the best rate of
torch's dense products of its type, "bytes" that of the second at the best rate of a memory copy; "at these rates" is
what the peer took over the longer of the two. These are rates that other code reached in this run, not limits of the
hardware: a weight that stays in the caches is read faster than memory is copied, and a product can be faster than
torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

from ferrolora.bench.contender import COPY, OURS, TORCH
from ferrolora.bench.row import Entry, Row
from ferrolora.bench.table import duration
from ferrolora.bench.targets import MISS, Judged

HEADER = ("missed target", "against", "goal", "measured", "arithmetic", "bytes", "at these rates")

TRIED = """\
Where the last column is below the goal, meeting the goal takes a kernel that is faster than torch's dense product, or
reads faster than a memory copy, in the same run. Elsewhere the distance is ours. What was tried for it:

- Few rows in float32: weight rows along the lanes instead of along K, two to fourteen rows of x in registers, decoding
  by table into the first-level cache, prefetching eight rows ahead. bitsandbytes, on such a processor, rounds x and W
  to bfloat16 instead of computing in float32.
- Many rows in float32: tiles of 14 by 32 (AVX-512), panels of x transposed in registers, chunks of 192 rows so that
  panels, slivers and tiles stay in the second-level cache. Each chunk decodes the weight again.
- LoRA: S from the packed x, the branch as more depth of the same tiles, dS from the packed dY.
- bfloat16: tiles of AMX with 512 of depth and 512 rows at a time, tiles that start at zero, one packing of dS, stores
  of whole lines, and groups of linears that share x.
"""


def bounds(rows: Sequence[Row], judged: Sequence[Judged]) -> list[tuple[str, ...]]:
    """One line a missed target of speed: goal, measured ratio, the two times, and the ratio at the longer one."""
    by_name = {row.name: row for row in rows}
    lines = []
    for line in judged:
        target = line.target
        if line.verdict != MISS or target.measure != "speed" or line.ratio is None:
            continue
        row = by_name[f"{target.suite} {target.work} {target.dtype}"]
        ours, theirs = row.find(OURS), row.find(target.against)
        if ours is None or theirs is None or theirs.median is None:
            continue
        arithmetic, moving = _over(ours.flops, _best_dense(rows, row)), _over(ours.bytes, _copy_rate(rows))
        longest = max(arithmetic or 0.0, moving or 0.0)
        lines.append(
            (
                target.name,
                target.against,
                target.goal,
                f"{line.ratio:.2f}x",
                duration(arithmetic) if arithmetic else "",
                duration(moving) if moving else "",
                f"{theirs.median / longest:.2f}x" if longest else "",
            )
        )
    return lines


def _over(amount: int | None, rate: float | None) -> float | None:
    return amount / rate if amount and rate else None


def _best_dense(rows: Sequence[Row], of: Row) -> float | None:
    """The best rate of torch's dense products of the type on the run's threads, in operations a second."""
    return max(_rates(rows, TORCH, "flops", of.dtype, of.threads), default=None)


def _copy_rate(rows: Sequence[Row]) -> float | None:
    """The best rate of a memory copy, in bytes read and written a second."""
    return max(_rates(rows, COPY, "bytes", None, None), default=None)


def _rates(rows: Sequence[Row], library: str, amount: str, dtype: str | None, threads: int | None) -> list[float]:
    entries: list[Entry] = [
        entry
        for row in rows
        if dtype is None or row.dtype == dtype
        for entry in row.entries
        if entry.library == library and (threads is None or entry.threads == threads)
    ]
    return [getattr(entry, amount) / entry.median for entry in entries if entry.median and getattr(entry, amount)]
