"""One QLoRA train step: ferrolora against PEFT + bitsandbytes, time and peak memory.

    python benches/python/train_step.py [--rounds 9] [--threads 2] [--out benches/results]

Same float weights, same NF4 + double quantization, same rank-16 LoRA values, same batch. Each library runs in a process
of its own, so that one that dies is a row and not the end. Steps are timed in turns, one library after the other, and
the median is reported; memory is measured in fresh processes, above the same process with everything imported. A row
says whether the gradients agree with a float model that holds exactly the decoded weights; a time without that is worth
nothing.

How torch's idle OpenMP threads wait (OMP_WAIT_POLICY of the environment: default, passive, active) changes the times of
both; the results name it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LIBRARIES = ("ferrolora", "bitsandbytes")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
# A float32 sum of K products is off by at most K * 2**-24 of the sum of their magnitudes: 1.3e-4 at K = 2112.
RIGHT = 1.3e-4


class Died(Exception):
    """The worker ended before it answered; the message is its last line of stderr."""


class Process:
    """A worker process that answers one request at a time."""

    def __init__(self, library: str, case: str, threads: int) -> None:
        command = [sys.executable, str(HERE / "worker.py"), library, case, str(threads)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ask(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(what + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            _, errors = self.process.communicate()
            last = errors.strip().splitlines() or [f"exit status {self.process.returncode}"]
            raise Died(last[-1])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.communicate()


def measure(case: str, rounds: int, threads: int) -> dict[str, Any]:
    """The row of one model."""
    row: dict[str, Any] = {library: {} for library in LIBRARIES}
    for library in LIBRARIES:
        attempt(row[library], Process(library, case, threads), ["memory"], close=True)
    workers = {library: Process(library, case, threads) for library in LIBRARIES}
    times: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for library, worker in workers.items():
        attempt(row[library], worker, ["ready"])
    for _ in range(rounds):
        for library, worker in workers.items():
            attempt(row[library], worker, ["step"])
            if "died" not in row[library]:
                times[library].append(row[library].pop("seconds"))
    for library, worker in workers.items():
        attempt(row[library], worker, ["check"], close=True)
        summarize(row[library], times[library])
    ours, theirs = (row[library] for library in LIBRARIES)
    if ours["right"] and theirs["right"]:
        row["speedup"] = theirs["median_seconds"] / ours["median_seconds"]
        row["memory_ratio"] = ours["step_peak_bytes"] / theirs["step_peak_bytes"]
    return row


def attempt(entry: dict[str, Any], worker: Process, requests: list[str], close: bool = False) -> None:
    """Put the answers into the entry, or why there are none."""
    if "died" not in entry:
        try:
            for request in requests:
                entry.update(worker.ask(request))
        except Died as reason:
            entry["died"] = str(reason)
    if close:
        worker.close()


def summarize(entry: dict[str, Any], times: list[float]) -> None:
    """Median and spread of the times, and the verdict."""
    entry["right"] = entry.get("gradient_error", float("inf")) <= RIGHT
    entry.pop("ready", None)
    if times:
        entry["median_seconds"] = statistics.median(times)
        entry["fastest_seconds"], entry["slowest_seconds"] = min(times), max(times)


def machine(threads: int) -> dict[str, Any]:
    """What a reader needs to judge the figures."""
    import ferrolora
    from ferrolora import _native

    cpu = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in cpu.split("\n\n")[0].splitlines() if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    flags = sorted(flag for flag in names.get("flags", "").split() if flag.startswith(("avx", "amx")))
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": names.get("model name", platform.processor()),
        "instruction_sets": flags,
        "ferrolora_isa": _native.isa(),
        "cores": os.cpu_count(),
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        "versions": {"ferrolora": ferrolora.__version__} | {name: version(name) for name in PACKAGES},
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'model':<12}{'library':<14}{'step':>10}{'spread':>18}{'model':>10}{'step peak':>11}  gradients"]
    for case, row in rows.items():
        for library in LIBRARIES:
            entry = row[library]
            if "died" in entry:
                lines.append(f"{case:<12}{library:<14}died: {entry['died']}")
                continue
            spread = f"{entry['fastest_seconds'] * 1e3:.0f}-{entry['slowest_seconds'] * 1e3:.0f} ms"
            memory = [f"{entry[key] / 2**20:.0f} MiB" for key in ("model_bytes", "step_peak_bytes")]
            verdict = "right" if entry["right"] else f"WRONG by {entry['gradient_error']:.2g}"
            step = f"{entry['median_seconds'] * 1e3:.0f} ms"
            lines.append(f"{case:<12}{library:<14}{step:>10}{spread:>18}{memory[0]:>10}{memory[1]:>11}  {verdict}")
        if "speedup" in row:
            lines.append(f"{'':<12}{row['speedup']:.2f}x as fast, {row['memory_ratio']:.2f} of the memory")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write; the exit status is 1 if ferrolora's own result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each library")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--models", nargs="+", default=["llama-512", "llama-1056", "minilm"])
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    arguments = parser.parse_args()
    rows = {case: measure(case, arguments.rounds, arguments.threads) for case in arguments.models}
    print(table(rows))
    header = machine(arguments.threads)
    path = arguments.out / f"train_step-{header['date']}-{header['omp_wait_policy'].lower()}.json"
    options = f"--rounds {arguments.rounds} --threads {arguments.threads} --models {' '.join(arguments.models)}"
    header["command"] = f"python benches/python/train_step.py {options}"
    path.write_text(json.dumps({**header, "rows": rows}, indent=2) + "\n")
    print(f"wrote {path}")
    return 0 if all(row["ferrolora"]["right"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
