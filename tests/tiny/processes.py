"""Runs scripts in several processes, each with the environment that torchrun would give it.

The processes are forked from one server, which has imported torch and its friends once: a start costs milliseconds
instead of the 20 seconds of these imports. What a launcher itself does is not tested this way.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

_PRELOADED = ["pytest", "transformers.models.llama.modeling_llama", "transformers.trainer", "peft", "ferrolora"]
_PRELOADED += ["deepspeed", "torch.distributed.fsdp"]
_SECONDS = 100  # below the time limit of a test: the output of what hangs is then shown


def run(script: str | Path, arguments: Sequence[object], folder: Path, ranks: int = 2) -> list[str]:
    """What each of `ranks` processes prints that run `script` as a program; its output waits in `folder`.

    Raises:
        AssertionError: a process failed or took too long; shows what each wrote.
    """
    command = [str(script), *map(str, arguments)]
    return [output.read_text() for output, _ in _launch(command, None, (), folder, ranks)]


def call(script: str | Path, function: str, arguments: Sequence[Any], folder: Path, ranks: int = 2) -> list[Any]:
    """What `function(*arguments)` of the file `script` returns in each of `ranks` processes; errors as `run`."""
    return [result for _, result in _launch([str(script)], function, arguments, folder, ranks)]


def _launch(
    command: list[str], function: str | None, arguments: Sequence[Any], folder: Path, ranks: int
) -> list[tuple[Path, Any]]:
    os.environ["DS_ACCELERATOR"] = "cpu"  # of the server, which imports deepspeed
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # As under torchrun the store is the launcher's, so that the port is taken before a process is told of it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_SECONDS))
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"rank{rank}.txt" for rank in range(ranks)]
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes: list[BaseProcess] = []
    try:
        for rank, (output, (_, sender)) in enumerate(zip(outputs, pipes, strict=True)):
            environment = _environment(rank, ranks, store.port)
            job = (command, function, tuple(arguments), environment, output, sender)
            processes.append(context.Process(target=_rank, args=job, daemon=True))
            processes[-1].start()
            sender.close()
        results = _results(processes, [receiver for receiver, _ in pipes])
    finally:
        for process in processes:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    if len(results) < ranks:
        texts = [f"rank {i}: exit code {code}\n{outputs[i].read_text()[-8000:]}" for i, code in enumerate(codes)]
        raise AssertionError("\n".join(texts))
    return [(outputs[rank], results[rank]) for rank in range(ranks)]


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets, and the transport of one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _results(processes: Sequence[BaseProcess], receivers: Sequence[Connection]) -> dict[int, Any]:
    """What the processes send, by rank; incomplete as soon as one ends without: the others would wait for it."""
    results: dict[int, Any] = {}
    waiting = {receiver: rank for rank, receiver in enumerate(receivers)}
    while waiting:
        for receiver in wait(list(waiting)):
            rank = waiting.pop(receiver)
            try:
                results[rank] = receiver.recv()
            except EOFError:
                return results
    for process in processes:
        process.join()
    failed = {rank for rank, process in enumerate(processes) if process.exitcode != 0}
    return {rank: result for rank, result in results.items() if rank not in failed}


def _rank(
    command: list[str],
    function: str | None,
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    output: Path,
    sender: Connection,
) -> None:
    """One process: ends by itself after the time limit, even if the tests are gone by then."""
    signal.alarm(_SECONDS)
    os.environ.update(environment)
    torch.set_num_threads(1)
    with output.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
    sys.argv = command
    if function is None:
        runpy.run_path(command[0], run_name="__main__")
        sender.send(None)
    else:
        sender.send(runpy.run_path(command[0])[function](*arguments))
