"""The memory of a layer's forward and backward is measured in a process of its own."""

import pytest

from ferrolora.bench import lora_memory
from ferrolora.bench.contender import OURS
from ferrolora.bench.problem import Problem
from ferrolora.bench.resident import is_measurable
from ferrolora.errors import FerroloraError


@pytest.mark.slow
@pytest.mark.skipif(not is_measurable(), reason="the system does not tell the peak")
def test_the_peak_holds_at_least_the_results_and_less_than_the_decoded_weight() -> None:
    problem = Problem(n=2048, k=2048, dtype="float32", m=256)
    found = lora_memory.peak_bytes(OURS, problem)
    assert found is not None
    # y and dX, 2 MB each; the weight would be 16.8 MB. A page or two may have been there before.
    assert 0.95 * problem.activation_bytes < found < problem.weight_bytes


@pytest.mark.slow
@pytest.mark.skipif(not is_measurable(), reason="the system does not tell the peak")
def test_a_process_that_fails_is_an_error_with_its_last_words() -> None:
    with pytest.raises(FerroloraError, match="the memory of nobody failed: KeyError: 'nobody'"):
        lora_memory.peak_bytes("nobody", Problem(64, 64, "float32", 4))
