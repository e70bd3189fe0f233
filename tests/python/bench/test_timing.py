"""Contenders take turns, on their own threads."""

import torch

from ferrolora.bench.timing import in_turns


def test_calls_take_turns_on_the_threads_they_ask_for() -> None:
    seen: list[tuple[str, int]] = []

    def call(name: str) -> None:
        seen.append((name, torch.get_num_threads()))

    before = torch.get_num_threads()
    times = in_turns([(lambda: call("a"), 1), (lambda: call("b"), 2)], rounds=3)
    assert [len(series) for series in times] == [3, 3]
    assert set(seen) == {("a", 1), ("b", 2)}
    turns = [name for i, (name, _) in enumerate(seen) if i == 0 or seen[i - 1][0] != name]
    assert turns == ["a", "b"] * 4  # the warm-up, then three rounds
    assert torch.get_num_threads() == before


def test_no_calls_take_no_turns() -> None:
    assert in_turns([], rounds=3) == []
