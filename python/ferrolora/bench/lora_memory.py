"""Memory that forward and backward with a low-rank branch need at their peak, in a fresh process.

python -m ferrolora.bench.lora_memory LIBRARY M N K DTYPE THREADS
"""

from __future__ import annotations

import statistics
import subprocess
import sys

import torch

from ferrolora.bench.inputs import forget_weight
from ferrolora.bench.lora_step import STEPS
from ferrolora.bench.problem import Problem
from ferrolora.bench.resident import is_measurable, settle
from ferrolora.bench.resident import peak_bytes as highest
from ferrolora.errors import FerroloraError

CALLS = 3  # the median of so many


def peak_bytes(library: str, problem: Problem) -> int | None:
    """Bytes at the peak of one forward and backward above the process that holds the layer, x and dY.

    Args:
        library: a key of `STEPS`.
        problem: the layer.

    Returns:
        The median of three calls in one process; None where the system does not tell (Linux does).

    Raises:
        FerroloraError: the process failed; says how.
    """
    if not is_measurable():
        return None
    sizes = [str(problem.rows), str(problem.n), str(problem.k)]
    command = [sys.executable, "-m", __name__, library, *sizes, problem.dtype, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise FerroloraError(f"the process that measures the memory of {library} failed: {reason}")
    return int(done.stdout.split()[-1])


def measure(library: str, problem: Problem) -> int:
    """Bytes at the peak of one call in this process, above what it holds before: the median of three."""
    STEPS[library](Problem(64, 64, problem.dtype, 16))()  # starts threads and loads code that any size needs
    run = STEPS[library](problem)
    forget_weight()  # of which each library holds what it needs
    found = []
    for _ in range(CALLS):
        before = settle()
        run()
        found.append(highest() - before)
    return int(statistics.median(found))


def main() -> None:
    """Print the bytes."""
    library, m, n, k, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    sys.stdout.write(f"{measure(library, Problem(int(n), int(k), dtype, int(m)))}\n")


if __name__ == "__main__":
    main()
