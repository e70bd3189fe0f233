"""The training order: every example once, like lengths together, the same again for the same seed and epoch."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ferrolora.train.sampler import LengthGroupedSampler


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 99), min_size=1, max_size=300), batch_size=st.integers(1, 7))
def test_each_example_comes_once_an_epoch(lengths: list[int], batch_size: int) -> None:
    assert sorted(LengthGroupedSampler(lengths, batch_size, seed=1)) == list(range(len(lengths)))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [1 + i * 7 % 13 for i in range(100)]
    sampler = LengthGroupedSampler(lengths, 4, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGroupedSampler(lengths, 4, seed=2)) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_a_batch_holds_examples_of_like_length_and_batches_are_mixed() -> None:
    lengths = [1 + i * 37 % 50 for i in range(200)]  # each length four times
    order = list(LengthGroupedSampler(lengths, 4, seed=1))
    batches = [[lengths[i] for i in order[start : start + 4]] for start in range(0, 200, 4)]
    assert all(len(set(batch)) == 1 for batch in batches)
    assert [batch[0] for batch in batches] != sorted(batch[0] for batch in batches)
