"""The order of training is arithmetic."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.order import Order, shuffled_position


@given(count=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_visits_everything_once(count, seed, epoch):
    assert sorted(shuffled_position(i, count=count, seed=seed, epoch=epoch) for i in range(count)) == list(range(count))


def test_the_permutation_is_pinned():
    # A resumed run of any version depends on it: do not edit.
    assert [shuffled_position(i, count=10, seed=1, epoch=2) for i in range(10)] == [3, 4, 2, 0, 6, 9, 8, 5, 1, 7]


def test_seeds_and_epochs_give_other_permutations():
    seen = {
        tuple(shuffled_position(i, count=50, seed=seed, epoch=epoch) for i in range(50))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(seen) == 16


def test_a_position_outside_is_refused():
    with pytest.raises(ValueError, match="position is 5, expected 0 to 4"):
        shuffled_position(5, count=5, seed=0, epoch=0)


def test_following_walks_one_batch_from_the_first_step_to_the_last():
    order = Order(kind="following", count=10, steps=4, batch_size=3, seed=0)
    walk = [order.batch(n) for n in range(4)]
    assert [{k for _, k in batch} for batch in walk] == [{0}, {1}, {2}, {3}]
    assert len({tuple(position for position, _ in batch) for batch in walk}) == 1
    assert [p for p, _ in order.batch(4)] != [p for p, _ in walk[0]]


def test_shuffled_draws_every_trajectory_once_an_epoch_and_all_steps_alike():
    order = Order(kind="shuffled", count=40, steps=5, batch_size=8, seed=0)
    epoch = [row for n in range(5) for row in order.batch(n)]
    assert sorted(position for position, _ in epoch) == list(range(40))
    steps = Counter(k for n in range(500) for _, k in order.batch(n))
    assert set(steps) == set(range(5)) and max(steps.values()) < 1.15 * min(steps.values())


def test_batches_go_on_across_the_end_of_an_epoch():
    order = Order(kind="shuffled", count=5, steps=2, batch_size=4, seed=0)
    rows = [position for n in range(5) for position, _ in order.batch(n)]
    for epoch in range(4):
        assert sorted(rows[5 * epoch : 5 * epoch + 5]) == list(range(5))
