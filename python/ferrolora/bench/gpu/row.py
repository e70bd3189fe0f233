"""One measured problem: ours, the ceiling, the peer, and the targets it is held to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GpuRow:
    """What was measured of one problem.

    Args:
        work: what is computed, with its sizes.
        seconds: contender -> seconds of one call; ours is "ferrolora", the best that the card allows "ceiling".
        error: relative error of our result, checked before it was timed.
        at_least: contender -> the least that its seconds over ours must be. Default {}.
    """

    work: str
    seconds: dict[str, float]
    error: float
    at_least: dict[str, float]

    def ratio(self, contender: str) -> float:
        """Its seconds over ours: above 1 we are faster."""
        return self.seconds[contender] / self.seconds["ferrolora"]

    def missed(self) -> list[str]:
        """A sentence for each target that is not met by a contender that was measured."""
        return [
            f"{self.work}: {self.ratio(name):.2f} of {name}, target {least}"
            for name, least in self.at_least.items()
            if name in self.seconds and self.ratio(name) < least
        ]

    def to_json(self) -> dict[str, Any]:
        """As a result file has it, the ratios written out."""
        others = [name for name in self.seconds if name != "ferrolora"]
        return {**asdict(self), "ratios": {name: round(self.ratio(name), 4) for name in others}}

    def cells(self) -> tuple[str, ...]:
        """As the table has it: microseconds, then ratios."""
        ours = f"{1e6 * self.seconds['ferrolora']:.1f}"
        others = [f"{name} {self.ratio(name):.2f}" for name in self.seconds if name != "ferrolora"]
        return self.work, ours, ", ".join(others), "; ".join(self.missed()) or "met"


HEADER = ("work", "µs", "faster than", "targets")
