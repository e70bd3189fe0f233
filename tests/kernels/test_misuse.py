"""The emulator says what a kernel did wrong and where, and nothing of a kernel that did nothing wrong."""

import pytest
import torch

from kernels.emulator import ROOT, EmulationError, Kernel, Out

# Entry -> what the report says after naming the thread. A race shows as such, or as a read of what is not written yet.
MISUSES = {
    "misuse_barrier": "race: read of .* with no barrier in between|read of .* which nobody wrote",
    "misuse_warp_barrier": "race: read of .* with no barrier in between|read of .* which nobody wrote",
    "misuse_reuse": "race: (read|write) of .* with no barrier in between",
    "misuse_wait": "read of offset .* to which a cp.async is on its way",
    "misuse_unwritten": "read of offset 20 of a shared array, which nobody wrote",
    "misuse_read": "out of bounds: read of 4 bytes at offset 2.. of argument 1",
    "misuse_underrun": "out of bounds: read of 4 bytes at offset -4 of argument 1",
    "misuse_write": "out of bounds: write of 4 bytes at offset 2.. of argument 2",
    "misuse_input": "write to argument 1 .*, an input",
    "misuse_shared": "out of bounds: write of 4 bytes at offset 128 of a shared array, which has 128",
    "misuse_alignment": "misaligned: read of 8 bytes at offset",
    "misuse_pointer": "followed a pointer without a wrapper",
    "misuse_null": "read of 4 bytes at .*, which is no pointer of this launch",
    "misuse_divergence": "divergent collective: it waits .*, thread .* does not",
    "misuse_branch": "divergent collective: it waits .*, thread .* does not",
    "misuse_kinds": "divergent collective: it waits .*, thread .* does not",
}
SIXTY_FOUR = {"misuse_barrier", "misuse_reuse", "misuse_branch"}


def run(entry: str, broken: int, seed: int) -> None:
    kernel = Kernel("misuse.cu", entry, {"BROKEN": broken}, (ROOT / "tests/kernels/misuse.cu").read_text())
    kernel((1, 1, 1), 64 if entry in SIXTY_FOUR else 32, torch.ones(64), Out(torch.zeros(64)), seed=seed)


@pytest.mark.parametrize("entry", MISUSES)
def test_a_misuse_is_reported_with_its_place_under_every_order_of_warps(entry: str) -> None:
    for seed in range(5):
        run(entry, broken=0, seed=seed)
        with pytest.raises(EmulationError, match=rf"^{entry}, block \(0, 0, 0\), thread \d+: ({MISUSES[entry]})"):
            run(entry, broken=1, seed=seed)


def test_a_launch_must_have_whole_warps_and_all_arguments() -> None:
    kernel = Kernel("misuse.cu", "misuse_read", {"BROKEN": 0}, (ROOT / "tests/kernels/misuse.cu").read_text())
    with pytest.raises(EmulationError, match="33 threads"):
        kernel((1, 1, 1), 33, torch.ones(64), Out(torch.zeros(64)))
    with pytest.raises(TypeError, match="takes 2 arguments"):
        kernel((1, 1, 1), 32, torch.ones(64))
    with pytest.raises(TypeError, match="contiguous"):
        kernel((1, 1, 1), 32, torch.ones(64, 2)[:, 0], Out(torch.zeros(64)))
