"""Each suite's contenders are right, and a wrong one is caught and not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ferrolora.bench import lora_memory
from ferrolora.bench.contender import BITSANDBYTES, FRESH, OURS, PEFT, REUSED, TORCH
from ferrolora.bench.inputs import forget_weight
from ferrolora.bench.peers import PEERS, choose_peers, missing_packages
from ferrolora.bench.problem import DTYPES, Problem
from ferrolora.bench.row import Row
from ferrolora.bench.run import measure_case, wrong_results
from ferrolora.bench.suites import dequantize, linear, lora, quantize
from ferrolora.bench.suites.registry import SUITES
from ferrolora.errors import UnsupportedError

EVERY = frozenset(name for name, _ in PEERS.values())
N, K = 64, 192


@pytest.fixture(autouse=True)
def quick_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started; one test below measures."""
    monkeypatch.setattr(lora_memory, "peak_bytes", lambda library, problem: 1000)
    choose_peers(None)
    forget_weight()


def problem(suite: str, dtype: str, rows: int = 3) -> Problem:
    return Problem(N, K, dtype, rows if SUITES[suite].rows else None)


def run(suite: str, dtype: str, rows: int = 3) -> Row:
    return measure_case(SUITES[suite].case(problem(suite, dtype, rows), EVERY), rounds=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suite", SUITES)
def test_every_contender_is_right_and_has_a_time_for_each_round(suite: str, dtype: str) -> None:
    row = run(suite, dtype)
    assert (row.suite, row.work, row.dtype) == (suite, problem(suite, dtype).work, dtype)
    for entry in row.entries:
        assert entry.right, (entry.library, entry.note)
        assert len(entry.seconds) == 2
        assert all(time > 0 for time in entry.seconds)
    assert row.ceiling in {entry.library for entry in row.entries}
    assert not wrong_results([row])


def test_memory_bound_suites_have_fresh_and_reused_outputs() -> None:
    for suite in ("quantize", "dequantize"):
        row = run(suite, "float32")
        assert {entry.output for entry in row.entries if entry.library == OURS} == {FRESH, REUSED}


def test_from_sixteen_rows_one_thread_is_measured_too(threads: Any) -> None:
    with threads(2):
        assert run("linear", "float32", rows=16).find(OURS, threads=1) is not None
        assert run("linear", "float32", rows=15).find(OURS, threads=1) is None


def test_only_the_chosen_peers_are_measured() -> None:
    row = measure_case(SUITES["lora"].case(problem("lora", "float32"), frozenset()), rounds=1)
    assert [entry.library for entry in row.entries] == [OURS, TORCH]


WRONG = {  # (module, name in it, what the name does instead)
    "quantize": (quantize, "quantize", lambda w, spec: _quantize(w.flip(0), spec)),
    "dequantize": (dequantize, "dequantize", lambda qt, dtype=None, out=None: _dequantize(qt, dtype).flip(0)),
    "linear": (linear, "linear", lambda x, qt: _linear(x, qt) * 1.01),
}
_quantize, _dequantize, _linear = quantize.quantize, dequantize.dequantize, linear.linear


@pytest.mark.parametrize("suite", WRONG)
def test_a_wrong_result_of_ours_has_no_time_and_is_reported(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*WRONG[suite])
    row = run(suite, "float32")
    entry = row.find(OURS, output=FRESH)
    assert entry is not None
    assert not entry.right
    assert entry.seconds == ()
    assert entry.note
    assert any(row.name in message for message in wrong_results([row]))
    assert all(other.right for other in row.entries if other.library != OURS)


def test_a_16_bit_product_with_more_than_twice_the_error_of_its_type_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(x: torch.Tensor, qt: Any) -> torch.Tensor:
        return (_linear(x, qt).float() * (1.0 + 2.0**-7)).bfloat16()  # two roundings, all upwards

    monkeypatch.setattr(linear, "linear", coarse)
    entry = run("linear", "bfloat16").find(OURS)
    assert entry is not None
    assert "over twice the error of plain torch.bfloat16" in entry.note


def test_a_wrong_gradient_of_ours_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ferrolora.bench import lora_step

    right = lora_step.ferrolora_step

    def wrong(given: Problem) -> Any:
        step = right(given)

        def changed() -> Any:
            y, dx, da, db = step()
            return y, dx, da + 1e-2 * da.abs().max(), db

        return changed

    monkeypatch.setitem(lora_step.STEPS, OURS, wrong)
    entry = run("lora", "float32").find(OURS)
    assert entry is not None
    assert entry.note.startswith("dA: ")
    assert entry.peak_bytes is None


def test_a_wrong_peer_has_no_time_and_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_bitsandbytes", lambda x, packed: lambda: torch.zeros(3, N))
    row = run("linear", "float32")
    entry = row.find(BITSANDBYTES)
    assert entry is not None
    assert not entry.right
    assert entry.seconds == ()
    assert not wrong_results([row])


def test_a_peer_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(x: Any, packed: Any) -> Any:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(linear, "_bitsandbytes", refuse)
    entry = run("linear", "float32").find(BITSANDBYTES)
    assert entry is not None
    assert (entry.right, entry.note) == (False, "refused: no kernel")


def test_the_right_row_length_shows_where_bitsandbytes_decodes_wrongly() -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("its decoder at fault is chosen only on a machine with AVX-512")
    row = measure_case(SUITES["dequantize"].case(Problem(64, 96, "float32"), EVERY), rounds=1)
    entry = row.find(BITSANDBYTES)
    assert entry is not None
    assert not entry.right


def test_a_peer_that_is_not_installed_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ferrolora.bench.peers.find_spec", lambda name: None if name == "bitsandbytes" else object())
    assert choose_peers(None) == {TORCH}
    assert missing_packages("peft") == ["bitsandbytes"]
    with pytest.raises(UnsupportedError, match=r"^peft is not installed: pip install bitsandbytes$"):
        choose_peers(["torch", "peft"])


def test_the_contenders_of_lora_are_three() -> None:
    case = lora.case(problem("lora", "float32"), EVERY)
    assert [contender.library for contender in case.contenders] == [OURS, PEFT, TORCH]
