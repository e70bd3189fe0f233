"""Compile every kernel for every architecture, without a GPU, and hold the machine code to the table.

    python .ci/compile_kernels.py [--quick] [--arch 90 ...] [--only gemv_4bit ...]

NVRTC and ptxas compile what the planner would launch for the problems below. Refused: a spilled register, a stack
frame, more registers than the row of the kernel table allows, and an instruction that the row claims and the code does
not hold (`nvdisasm` reads it). The figures go to `target/kernels/compiled.txt`. `--quick` takes one problem a kernel.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cuda.bindings import nvrtc
from cuda.pathfinder import find_nvidia_binary_utility, load_nvidia_dynamic_lib

from ferrolora import _native
from ferrolora.errors import UnsupportedError

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "target" / "kernels" / "compiled.txt"
ARCHITECTURES = [75, 80, 86, 89, 90, 100, 120]
Problem = dict[str, Any]


def problem(op: str, m: int = 0, **rest: Any) -> Problem:
    """A linear of an 8B model, in the codec's default."""
    usual = {"n": 4096, "k": 4096, "dtype": "float16", "quant_type": "nf4", "block_size": 64, "nested": True}
    branch = {"rank": 0, "lora_dtype": "float32", "bias_dtype": None, "dropout_p": 0.0, "exact": False}
    return {"op": op, "m": m, **usual, **branch, "kernel": None, "fused_rows": None, **rest}


BF16, F32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
BRANCH = {"rank": 16, "dropout_p": 0.1}
WIDE = {"rank": 64, "lora_dtype": "bfloat16", **BF16}
LONE = {"block_size": 128, "nested": False, "quant_type": "fp4"}
SMALL_BLOCKS = {"block_size": 32}

# Kernel -> problems that it is compiled for; the first is the usual one.
PROBLEMS: dict[str, list[Problem]] = {
    "dequantize_4bit": [problem("dequantize", **v) for v in ({}, BF16, F32, LONE)],
    "dequantize_4bit_transposed": [problem("dequantize_transposed", **v) for v in ({}, F32)],
    "dequantize_int8": [problem("dequantize", quant_type="int8", nested=False, **v) for v in ({}, F32)],
    "quantize_4bit": [problem("quantize", **v) for v in ({}, BF16, F32, LONE, {"block_size": 4096})],
    "quantize_int8": [problem("quantize", quant_type="int8", nested=False, **v) for v in ({}, F32)],
    "absmax_mean": [problem("absmax_mean", **F32)],
    "quantize_absmax": [problem("quantize_absmax", **F32)],
    "gemv_4bit": [
        problem("linear", 1, **v) for v in ({"rank": 16}, BF16, LONE, {**SMALL_BLOCKS, **BF16}, WIDE, {"n": 14336})
    ],
    "gemm_4bit": [
        problem("linear", m, **v)
        for m, v in (
            (64, {"rank": 16}),
            (16, BF16),
            (32, LONE),
            (128, WIDE),
            (64, SMALL_BLOCKS),
            (128, {"exact": True, "rank": 16}),
            (16, {"exact": True}),
        )
    ],
    "gemm_4bit_backward": [
        problem("linear_backward", m, **v)
        for m, v in ((64, BRANCH), (16, BF16), (32, LONE), (128, WIDE), (128, BRANCH))
    ],
    "lora_input": [problem("lora_input", 2048, **v) for v in (BRANCH, WIDE, {"rank": 8}, {"rank": 128})],
    "lora_output_gradients": [
        problem("lora_output_gradients", 2048, **v) for v in (BRANCH, WIDE, {"rank": 8}, {"rank": 32}, {"rank": 128})
    ],
    "lora_input_gradient": [
        problem("lora_input_gradient", 2048, **v) for v in (BRANCH, WIDE, {"rank": 8}, {"rank": 32}, {"rank": 128})
    ],
    "lora_add_input_gradient": [problem("lora_add_input_gradient", 2048, **v) for v in (BRANCH, WIDE)],
    "lora_add_output": [problem("lora_add_output", 2048, **v) for v in (BRANCH, WIDE)],
    "fma_forward": [
        problem("linear", 16, **v)
        for v in ({**F32, **BRANCH}, WIDE, {**F32, "k": 4090}, {"quant_type": "int8", "nested": False})
    ],
    "fma_backward": [problem("linear_backward", 16, **v) for v in ({**F32, **BRANCH}, WIDE, {**F32, "k": 4090})],
    "fma_lora_input": [problem("lora_input", 16, **v) for v in ({**F32, **BRANCH}, WIDE)],
    "fma_lora_ds": [problem("lora_ds", 16, **v) for v in ({**F32, **BRANCH}, WIDE)],
    "fma_lora_db": [problem("lora_db", 16, **v) for v in ({**F32, **BRANCH}, WIDE)],
    "fma_lora_da": [problem("lora_input_gradient", 16, **v) for v in ({**F32, **BRANCH}, WIDE)],
}


class Job(NamedTuple):
    """One entry, compiled with its constants for one architecture."""

    entry: str
    file: str
    constants: tuple[tuple[str, str], ...]
    sm: int


class Code(NamedTuple):
    """What ptxas and the disassembler say of an entry."""

    registers: int
    stack: int
    spilled: int
    shared: int
    size: int
    seconds: float
    mnemonics: Counter[str]


def planned(entry: str, wanted: Problem, sm: int) -> Job | None:
    """The specialization that the planner takes; None where it refuses the problem on this architecture."""
    try:
        plan = _native.cuda_plan({**wanted, "kernel": entry}, sm)
    except UnsupportedError:
        return None
    if plan is None or plan["entry"] != entry:
        raise RuntimeError(f"the plan of {wanted} on sm_{sm} is {plan and plan['entry']}, not {entry}")
    return Job(entry, plan["file"], tuple(sorted(plan["constants"].items())), sm)


def jobs(architectures: list[int], entries: list[str], quick: bool) -> Iterator[Job]:
    """Every specialization once, each entry at least once on some architecture."""
    for entry in entries:
        problems = PROBLEMS[entry][: 1 if quick else None]
        found = {job: None for sm in architectures for p in problems if (job := planned(entry, p, sm)) is not None}
        if not found:
            raise RuntimeError(f"{entry}: the planner takes none of its problems")
        yield from found


def checked(result: tuple[Any, ...]) -> Any:
    """The value of an NVRTC call."""
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {status.name}")
    return values[0] if values else None


def nvrtc_compile(job: Job) -> tuple[bytes, str]:
    """The cubin and ptxas' report."""
    load_nvidia_dynamic_lib("nvrtc")
    source = _native.cuda_source(job.file).encode()
    program = checked(nvrtc.nvrtcCreateProgram(source, job.file.encode(), 0, [], []))
    options = [f"--gpu-architecture=sm_{job.sm}", "--std=c++17", "--ptxas-options=-v"]
    options += [f"--define-macro={name}={value}" for name, value in job.constants]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    text = log.decode().rstrip("\0\n")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{describe(job)}: {text}")
    cubin = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
    checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    return bytes(cubin), text


def mnemonics(cubin: bytes, entry: str) -> tuple[Counter[str], int]:
    """The instructions of an entry and their number."""
    disassembler = find_nvidia_binary_utility("nvdisasm")
    if disassembler is None:
        raise RuntimeError("the claims of the kernel table need nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler, "--print-code", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    section = text.partition(f".section\t.text.{entry},")[2].partition("\n.section")[0]
    found = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", section, re.MULTILINE)
    return Counter(found), len(found)


def compile_one(job: Job) -> Code:
    start = time.perf_counter()
    cubin, log = nvrtc_compile(job)
    seconds = time.perf_counter() - start
    report = log.partition(f"entry function '{job.entry}'")[2].partition("entry function")[0]
    figure = {
        what: int(found[1]) if (found := re.search(pattern, report)) else 0
        for what, pattern in (
            ("registers", r"Used (\d+) registers"),
            ("stack", r"(\d+) bytes stack frame"),
            ("spilled", r"(\d+) bytes spill stores"),
            ("shared", r"(\d+) bytes smem"),
        )
    }
    if not figure["registers"]:
        raise RuntimeError(f"{describe(job)}: ptxas says nothing of it:\n{log}")
    counts, size = mnemonics(cubin, job.entry)
    return Code(**figure, size=size, seconds=seconds, mnemonics=counts)


def describe(job: Job) -> str:
    constants = " ".join(f"{name.removeprefix('FL_').lower()}={value}" for name, value in job.constants)
    return f"{job.entry} sm_{job.sm} {constants}"


def complaints(job: Job, code: Code, row: dict[str, Any]) -> Iterator[str]:
    """What the table does not allow."""
    if code.stack or code.spilled:
        yield f"{describe(job)}: {code.stack} bytes of stack, {code.spilled} spilled"
    if code.registers > row["max_registers"]:
        yield f"{describe(job)}: {code.registers} registers, the table allows {row['max_registers']}"
    for instruction, since in row["claims"]:
        if job.sm >= since and not any(name.startswith(instruction) for name in code.mnemonics):
            yield f"{describe(job)}: no {instruction} in it, which the table claims"


def main() -> int:
    rows = {row["entry"]: row for row in _native.cuda_kernels()}
    if set(rows) != set(PROBLEMS):
        sys.exit(f"problems and kernel table differ: {set(rows) ^ set(PROBLEMS)}")
    parser = argparse.ArgumentParser(description="compile every kernel for every architecture")
    parser.add_argument("--quick", action="store_true", help="one problem a kernel")
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="10 · major + minor")
    parser.add_argument("--only", nargs="+", choices=sorted(rows), default=list(rows), help="entries")
    args = parser.parse_args()
    work = list(jobs(args.arch, args.only, args.quick))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        codes = list(pool.map(compile_one, work))
    lines = [f"{'registers':>9} {'shared':>7} {'instr.':>7} {'seconds':>7}  kernel"]
    lines += [
        f"{code.registers:9} {code.shared:7} {code.size:7} {code.seconds:7.2f}  {describe(job)}"
        for job, code in zip(work, codes, strict=True)
    ]
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text("\n".join(lines) + "\n")
    errors = [
        message for job, code in zip(work, codes, strict=True) for message in complaints(job, code, rows[job.entry])
    ]
    print("\n".join(lines))
    print("\n".join(errors), end="\n" if errors else "", file=sys.stderr)
    print(f"{len(work)} specializations of {len(args.only)} kernels on {len(args.arch)} architectures")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
