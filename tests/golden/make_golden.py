"""Write the golden vectors beside this file, and stop if bitsandbytes disagrees with them where it must not.

    python tests/golden/make_golden.py            # rewrite the files
    python tests/golden/make_golden.py --check    # exit 1 if a file differs from what would be written

Expected values come from bitsandbytes itself. Where its CPU code departs from its definition (README.md here names
the four places) they come from the definition, `bitsandbytes_rule.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from golden import bitsandbytes_rule as rule  # noqa: E402  the path above makes it importable as a script
from golden.records import Record, bits, render  # noqa: E402
from golden.weights import KINDS, SEED, weight, with_neighbours  # noqa: E402

FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EVERY_KIND = [(64, 257), (64, 200), (32, 131)]  # an odd count and a short last block; an even one; the smallest block


def shapes() -> Iterator[tuple[int, int]]:
    """(block size, element count): all block sizes; multiples, odd counts, short last blocks, fewer than a block."""
    yield from EVERY_KIND
    yield from [(64, 256), (64, 1), (64, 63), (32, 96), (128, 300)]
    yield from [(256, 513), (512, 600), (1024, 1100), (2048, 2100), (4096, 4104)]


def four_bit(quant_type: str) -> Iterator[Record]:
    """Quantize, double-quantize and decode records of one 4-bit type."""
    for block_size, numel in shapes():
        for kind in KINDS:
            values = weight(kind, (numel,))
            if (block_size, numel) not in EVERY_KIND and kind not in ("random", "thresholds"):
                continue  # the other shapes differ in length only
            if numel > 600 and kind != "random":
                continue  # keeps the files small
            for dtype_name in FLOATS if block_size == 64 and kind == "random" else ("float32",):
                yield four_bit_record(f"{kind}-{numel}", values.to(FLOATS[dtype_name]), quant_type, block_size)


def four_bit_record(name: str, x: Tensor, quant_type: str, block_size: int) -> Record:
    """One weight: codes, scales, double-quantized scales, and what each decodes to."""
    codes, absmax = rule.quantize_4bit(x, quant_type, block_size)
    check_against_bitsandbytes(x, quant_type, block_size, codes, absmax)
    nested = rule.double_quantize(absmax)
    plain = rule.dequantize_4bit(codes, absmax, quant_type, block_size, x.numel())
    double = rule.dequantize_4bit(codes, rule.double_dequantize(nested), quant_type, block_size, x.numel())
    dtype_name = str(x.dtype).removeprefix("torch.")
    record = {
        "case": f"{quant_type}-b{block_size}-{name}-{dtype_name}",
        "quant_type": quant_type,
        "block_size": str(block_size),
        "dtype": dtype_name,
        "numel": str(x.numel()),
        "input": bits(x),
        "codes": bits(codes),
        "absmax": bits(absmax),
        "nested_codes": bits(nested.codes),
        "nested_absmax": bits(nested.absmax),
        "offset": bits(nested.offset),
        "decoded_float32": bits(plain),
    }
    if block_size == 64:
        record["decoded_float16"] = bits(plain.half())
        record["decoded_bfloat16"] = bits(plain.bfloat16())
        record["decoded_nested_float32"] = bits(double)
    return record


def check_against_bitsandbytes(x: Tensor, quant_type: str, block_size: int, codes: Tensor, absmax: Tensor) -> None:
    """Full blocks of NF4 equal bitsandbytes' own output in every bit; its other departures are in the parity tests."""
    their_codes, state = bnb.functional.quantize_4bit(x, blocksize=block_size, quant_type=quant_type)
    full = x.numel() - x.numel() % block_size
    scales = full // block_size
    if not torch.equal(state.absmax[:scales], absmax[:scales]):
        raise SystemExit(f"absmax differs from bitsandbytes: {quant_type}, block {block_size}, {x.numel()} elements")
    if quant_type == "nf4" and not torch.equal(their_codes[: full // 2], codes[: full // 2]):
        raise SystemExit(f"codes differ from bitsandbytes: nf4, block {block_size}, {x.numel()} elements")


def double_quant() -> Iterator[Record]:
    """Scales alone, long enough for several nested blocks and a short last one."""
    generator = torch.Generator().manual_seed(SEED)
    for count in (1, 2, 255, 256, 257, 700):
        for kind, scale in (("normal", 1.0), ("small", 1e-4)):
            absmax = torch.rand(count, generator=generator) * scale
            nested = rule.double_quantize(absmax)
            yield {
                "case": f"double-{kind}-{count}",
                "numel": str(count),
                "absmax": bits(absmax),
                "offset": bits(nested.offset),
                "nested_codes": bits(nested.codes),
                "nested_absmax": bits(nested.absmax),
                "decoded_float32": bits(rule.double_dequantize(nested)),
            }


def blockwise() -> Iterator[Record]:
    """8-bit dynamic map."""
    for block_size, numel in ((64, 300), (256, 512), (256, 700), (4096, 100)):
        for kind in KINDS:
            values = dynamic_neighbours(numel, block_size) if kind == "thresholds" else weight(kind, (numel,))
            codes, absmax = rule.quantize_blockwise(values, block_size)
            decoded = rule.dequantize_blockwise(codes, absmax, block_size)
            yield {
                "case": f"dynamic8-b{block_size}-{kind}-{numel}",
                "block_size": str(block_size),
                "dtype": "float32",
                "numel": str(numel),
                "input": bits(values),
                "codes": bits(codes),
                "absmax": bits(absmax),
                "decoded_float32": bits(decoded),
            }


def dynamic_neighbours(numel: int, block_size: int) -> Tensor:
    """Midpoints of the dynamic map and their neighbours; every block starts with 1.0, so its scale is 1."""
    values = rule.dynamic_map()
    middle = (values[:-1] + values[1:]) / 2
    near = with_neighbours(middle)
    line = near.repeat(-(-numel // near.numel()))[:numel].clone()
    line[::block_size] = 1.0
    return line


def int8() -> Iterator[Record]:
    """Row-wise int8."""
    generator = torch.Generator().manual_seed(SEED)
    for rows, columns in ((4, 33), (48, 5), (3, 64)):
        for dtype_name, dtype in FLOATS.items():
            x = torch.randn(rows, columns, generator=generator).to(dtype)
            # Scales to 63.5, a tie, or beside it by the order of operations.
            x[:, 1] = x.abs().amax(dim=1) / 2
            codes, scale = rule.quantize_int8(x)
            their_codes, their_scale, _ = bnb.functional.int8_vectorwise_quant(x.clone())
            their_values = bnb.functional.int8_vectorwise_dequant(their_codes, their_scale)
            values = rule.dequantize_int8(codes, scale)
            pairs = ((codes, their_codes), (scale, their_scale), (values, their_values))
            if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
                raise SystemExit(f"int8 differs from bitsandbytes: {rows} x {columns}, {dtype_name}")
            yield {
                "case": f"int8-{rows}x{columns}-{dtype_name}",
                "dtype": dtype_name,
                "rows": str(rows),
                "columns": str(columns),
                "input": bits(x),
                "codes": bits(codes),
                "absmax": bits(scale),
                "decoded_float32": bits(values),
            }


def main() -> int:
    """Write or check the files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    check = parser.parse_args().check
    if bnb.__version__ != "0.50.2":
        raise SystemExit(f"bitsandbytes 0.50.2 makes the golden vectors, found {bnb.__version__}")
    torch.set_num_threads(1)
    stale = []
    for name, records in (
        ("nf4", four_bit("nf4")),
        ("fp4", four_bit("fp4")),
        ("double_quant", double_quant()),
        ("dynamic8", blockwise()),
        ("int8", int8()),
    ):
        path = HERE / f"{name}.txt"
        text = render(records)
        if not check:
            path.write_text(text)
        elif path.read_text() != text:
            stale.append(path.name)
    if stale:
        print(f"stale golden vectors: {', '.join(stale)}; run python tests/golden/make_golden.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
