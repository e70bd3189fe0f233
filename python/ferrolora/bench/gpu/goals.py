"""THE table of targets for a GPU: every work that `ferrolora bench --suite gpu` measures, and what it is held to."""

from __future__ import annotations

from typing import NamedTuple

OURS, CEILING, IDEAL = "ferrolora", "ceiling", "ideal"
BITSANDBYTES, PEFT, UNSLOTH, DENSE = "bitsandbytes", "peft+bitsandbytes", "unsloth", "F.linear"
RANK = 16
TOKENS = 2048
# The seven linears of an 8B Llama layer, those of one shape together: [N, K].
LINEARS = {
    "q, o": (4096, 4096),
    "k, v": (1024, 4096),
    "gate, up": (14336, 4096),
    "down": (4096, 14336),
}
TILE_ROWS = (2, 4, 8, 16, 32, 64)


class Goal(NamedTuple):
    """What a work is held to, a lower value being the better one everywhere.

    Args:
        against: the contender it is compared with.
        bound: at least that times as good as it (theirs over ours); with `at_most`, at most that share (ours over
            theirs).
        at_most: which of the two. Default False.
    """

    against: str
    bound: float
    at_most: bool = False

    def ratio(self, ours: float, theirs: float) -> float:
        """What is compared with the bound."""
        return ours / theirs if self.at_most else theirs / ours

    def is_met(self, ratio: float) -> bool:
        """Whether a ratio reaches the bound."""
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}x"


class Work(NamedTuple):
    """One thing to measure: m rows of x and a weight [n, k]; all 0 where a whole model is measured."""

    group: str
    name: str
    m: int
    n: int
    k: int
    goals: tuple[Goal, ...]


class Mean(NamedTuple):
    """A goal for the geometric mean over a group."""

    group: str
    name: str
    goal: Goal


MEANS = (Mean("gemm", f"linear, m = {TILE_ROWS[0]} to {TILE_ROWS[-1]}, geometric mean", Goal(BITSANDBYTES, 1.2)),)


def works() -> list[Work]:
    """Every work, in the order they are measured in: Unsloth, which patches other libraries, is in the last group."""
    n, k = 4096, 14336
    found = [Work("dequantize", f"dequantize {n}x{k}", 0, n, k, (Goal(CEILING, 0.85), Goal(BITSANDBYTES, 1.25)))]
    few = (Goal(CEILING, 0.7), Goal(BITSANDBYTES, 1.3))
    found += [Work("gemv", f"linear 1x{n}x{k} ({name})", 1, n, k, few) for name, (n, k) in LINEARS.items()]
    found += [
        Work("gemm", f"linear {m}x{n}x{k} ({name})", m, n, k, (Goal(BITSANDBYTES, 0.95),))
        for m in TILE_ROWS
        for name, (n, k) in LINEARS.items()
    ]
    kept = (Goal(IDEAL, 1.05, at_most=True),)
    found += [Work("saved", f"saved, 4096x{n}x{k} ({name})", 4096, n, k, kept) for name, (n, k) in LINEARS.items()]
    found.append(Work("host", "host, 1x4096x4096", 1, 4096, 4096, (Goal(DENSE, 2.0, at_most=True),)))
    found.append(Work("train", f"train step, 8B, {TOKENS} tokens", 0, 0, 0, (Goal(PEFT, 1.3),)))
    found.append(Work("train-memory", "train step, 8B, peak memory", 0, 0, 0, (Goal(PEFT, 0.8, at_most=True),)))
    both = (Goal(PEFT, 1.4), Goal(UNSLOTH, 1.05), Goal(DENSE, 0.88))
    found += [
        Work("step", f"step 4096x{n}x{k} r={RANK} ({name})", 4096, n, k, both) for name, (n, k) in LINEARS.items()
    ]
    return found


ABOUT = {
    "dequantize": "NF4 with double quantization to bfloat16; the ceiling is a device-to-device copy of as many bytes",
    "gemv": "one row, NF4; the ceiling is reading the packed weight at the bandwidth of a copy",
    "gemm": "few rows, NF4",
    "saved": "bytes that autograd keeps of one linear with LoRA; ideal: x and S in 16 bits",
    "host": "host time to launch one fused linear with LoRA, the device not waited for",
    "train": "forward, backward and AdamW over a Llama of 8B, LoRA on every linear",
    "train-memory": "the same steps: most bytes that torch had allocated, the model counted",
    "step": "linear with LoRA, forward and backward; F.linear: forward and dX of a frozen bfloat16 weight",
}
