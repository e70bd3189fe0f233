"""bitsandbytes' own layers on ferrolora's CPU kernels: one call, and code written for bitsandbytes runs as it is.

    python examples/bitsandbytes_backend.py [--size 2048]

Prints the time of quantizing a weight, of decoding it, and of a forward and backward pass, before and after.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from ferrolora.integrations import bitsandbytes as backend

parser = argparse.ArgumentParser()
parser.add_argument("--size", type=int, default=2048)
size = parser.parse_args().size

torch.manual_seed(0)
weight, x = torch.randn(size, size), torch.randn(64, size, requires_grad=True)
layer = bnb.nn.Linear4bit(size, size, bias=False, quant_type="nf4", compute_dtype=torch.float32)
layer.load_state_dict({"weight": weight})
layer = layer.to("cpu")  # bitsandbytes quantizes as it moves
codes, state = quantize_4bit(weight, quant_type="nf4")


def milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure() -> dict[str, float]:
    return {
        "quantize": milliseconds(lambda: quantize_4bit(weight, quant_type="nf4")),
        "dequantize": milliseconds(lambda: dequantize_4bit(codes, state)),
        "forward and backward": milliseconds(lambda: layer(x).sum().backward()),
    }


theirs, before = measure(), layer(x).detach()
backend.enable()
ours, after = measure(), layer(x).detach()
backend.disable()
for name, was in theirs.items():
    print(f"{name}: {was:.2f} ms -> {ours[name]:.2f} ms, {was / ours[name]:.1f} times as fast")
error = float((after - before).abs().max() / before.abs().max())
print(f"largest difference of the outputs, relative to the largest output: {error:.1e}")
assert error < 1e-2  # bitsandbytes rounds to bfloat16 where the processor multiplies that
