"""The order of training is arithmetic."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secondcast.storage_schemas.errors import SettingsError
from secondcast.trainer.data.sampler import (
    InterleavedSampler,
    Part,
    Sampler,
    proportional_turn,
    rank_slice,
    shuffled_position,
)


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
    order = Sampler(kind="sequential", parts=(Part(count=10),), steps=4, batch_size=3, seed=0)
    walk = [order.batch(n) for n in range(4)]
    assert [{k for _, k in batch} for batch in walk] == [{0}, {1}, {2}, {3}]
    assert len({tuple(position for position, _ in batch) for batch in walk}) == 1
    assert [p for p, _ in order.batch(4)] != [p for p, _ in walk[0]]


def test_shuffled_draws_every_trajectory_once_an_epoch_and_all_steps_alike():
    order = Sampler(kind="shuffled", parts=(Part(count=40),), steps=5, batch_size=8, seed=0)
    epoch = [row for n in range(5) for row in order.batch(n)]
    assert sorted(position for position, _ in epoch) == list(range(40))
    steps = Counter(k for n in range(500) for _, k in order.batch(n))
    assert set(steps) == set(range(5)) and max(steps.values()) < 1.15 * min(steps.values())


def test_batches_go_on_across_the_end_of_an_epoch():
    order = Sampler(kind="shuffled", parts=(Part(count=5),), steps=2, batch_size=4, seed=0)
    rows = [position for n in range(5) for position, _ in order.batch(n)]
    for epoch in range(4):
        assert sorted(rows[5 * epoch : 5 * epoch + 5]) == list(range(5))


@given(
    share=st.integers(1, 6),
    groups=st.integers(1, 5),
    spare=st.integers(0, 20),
    count=st.integers(1, 40),
    step=st.integers(0, 10**6),
    seed=st.integers(0, 2**63 - 1),
)
def test_rows_that_share_a_forward_are_different_steps_of_one_trajectory(share, groups, spare, count, step, seed):
    order = Sampler(
        kind="shuffled", parts=(Part(count=count),), steps=share + spare, batch_size=share * groups, seed=seed,
        timesteps_per_sample=share,
    )  # fmt: skip
    rows = order.batch(step)
    assert rows == order.batch(step) and len(rows) == share * groups
    for first in range(0, len(rows), share):
        group = rows[first : first + share]
        assert len({position for position, _ in group}) == 1
        assert len({k for _, k in group}) == share


def test_shared_batches_draw_every_trajectory_once_an_epoch_and_all_steps_alike():
    order = Sampler(kind="shuffled", parts=(Part(count=40),), steps=5, batch_size=8, seed=0, timesteps_per_sample=4)
    epoch = [row for n in range(20) for row in order.batch(n)]
    assert set(Counter(position for position, _ in epoch).values()) == {4}
    steps = Counter(k for n in range(500) for _, k in order.batch(n))
    assert set(steps) == set(range(5)) and max(steps.values()) < 1.15 * min(steps.values())


def test_the_order_of_shared_batches_is_pinned():
    # A resumed run of any version depends on it: do not edit.
    order = Sampler(kind="shuffled", parts=(Part(count=10),), steps=5, batch_size=4, seed=1, timesteps_per_sample=2)
    assert [order.batch(n) for n in (0, 7)] == [[(7, 2), (7, 0), (3, 0), (3, 1)], [(3, 3), (3, 2), (6, 3), (6, 4)]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sequential"}, "timesteps_per_sample is 2 in the order 'sequential', expected 1"),
        ({"batch_size": 5}, "timesteps_per_sample is 2, expected a divisor of the batch size 5, at most 4"),
        ({"steps": 1}, "timesteps_per_sample is 2, expected a divisor of the batch size 6, at most 1"),
    ],
)
def test_what_cannot_share_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        usual = {"kind": "shuffled", "parts": (Part(count=9),), "steps": 4, "batch_size": 6, "seed": 0}
        Sampler(**usual | changes, timesteps_per_sample=2)


def test_a_process_takes_whole_groups_of_rows_that_share():
    order = Sampler(kind="shuffled", parts=(Part(count=9),), steps=4, batch_size=8, seed=0, timesteps_per_sample=4)
    assert rank_slice(order.batch(3), rank=1, ranks=2, rows_per_pass=4) == order.batch(3)[4:]
    with pytest.raises(ValueError, match="batch of 8 rows, expected a multiple of 4 processes x 4 rows per forward"):
        rank_slice(order.batch(0), rank=0, ranks=4, rows_per_pass=4)


SHARES = st.lists(st.fractions(min_value=Fraction(1, 1000), max_value=1000, max_denominator=1000), min_size=1)


@pytest.mark.thorough
@given(shares=SHARES.filter(lambda shares: len(shares) <= 6), turns=st.integers(1, 40))
def test_every_turn_goes_to_one_who_is_told_how_many_they_had(shares, turns):
    had = [0] * len(shares)
    for turn in range(turns):
        who, before = proportional_turn(turn, shares)
        assert before == had[who]
        had[who] += 1
        for place, (count, share) in enumerate(zip(had, shares, strict=True)):
            assert abs(count - (turn + 1) * share / sum(shares)) < place + 1


@given(shares=SHARES.filter(lambda shares: len(shares) == 2), turn=st.integers(0, 10**12))
def test_of_two_nobody_is_a_whole_turn_off_their_due_however_late(shares, turn):
    who, before = proportional_turn(turn, shares)
    assert abs(before - turn * shares[who] / sum(shares)) < 1


def test_whole_numbers_are_met_exactly_in_every_round():
    who = [proportional_turn(turn, [Fraction(10), Fraction(1), Fraction(1)])[0] for turn in range(120)]
    assert all(Counter(who[first : first + 12]) == {0: 10, 1: 1, 2: 1} for first in range(0, 120, 12))


def mixed(**changes):
    parts = (Part(count=6, share=Fraction(3)), Part(count=4, first=6, share=Fraction(1)))
    return Sampler(**{"kind": "shuffled", "parts": parts, "steps": 5, "batch_size": 8, "seed": 3} | changes)


def test_a_batch_mixes_caches_by_their_shares_and_each_has_epochs_of_its_own():
    order = mixed()
    for step in range(20):
        assert sum(position < 6 for position, _ in order.batch(step)) == 6
    rows = [position for step in range(20) for position, _ in order.batch(step)]
    first, second = ([p for p in rows if (p >= 6) == other] for other in (False, True))
    assert all(sorted(first[at : at + 6]) == list(range(6)) for at in range(0, len(first), 6))
    assert all(sorted(second[at : at + 4]) == list(range(6, 10)) for at in range(0, len(second), 4))


def test_a_walk_over_several_caches_is_of_the_same_trajectories_to_its_end():
    order = mixed(kind="sequential")
    for walk in range(3):
        batches = [order.batch(5 * walk + k) for k in range(5)]
        assert len({tuple(position for position, _ in batch) for batch in batches}) == 1
        assert [{k for _, k in batch} for batch in batches] == [{0}, {1}, {2}, {3}, {4}]


def test_the_first_of_several_caches_is_seen_in_the_order_it_has_alone():
    alone = mixed(parts=(Part(count=6),), batch_size=6)
    rows = [position for step in range(3) for position, _ in mixed().batch(step) if position < 6]
    assert rows == [position for step in range(3) for position, _ in alone.batch(step)]


def test_the_order_of_mixed_batches_is_pinned():
    # A resumed run of any version depends on it: do not edit.
    assert [mixed(batch_size=4).batch(n) for n in (0, 9)] == [
        [(8, 2), (2, 4), (3, 3), (1, 0)],
        [(8, 0), (2, 2), (1, 1), (5, 4)],
    ]


def test_orders_that_no_batch_can_mix_take_turns_by_their_shares():
    first = mixed(parts=(Part(count=6, share=Fraction(3)),))
    second = mixed(parts=(Part(count=4, first=6, share=Fraction(1)),), steps=7)
    turns = InterleavedSampler([first, second])
    batches = [turns.batch(step) for step in range(40)]
    own = [[batch for batch in batches if (batch[0][0] >= 6) == other] for other in (False, True)]
    assert [len(batches) for batches in own] == [30, 10]
    assert own == [[order.batch(step) for step in range(count)] for order, count in ((first, 30), (second, 10))]


def test_the_turns_of_walks_are_whole_walks():
    first = mixed(kind="sequential", parts=(Part(count=6, share=Fraction(1)),))
    second = mixed(kind="sequential", parts=(Part(count=4, first=6, share=Fraction(1)),))
    turns = InterleavedSampler([first, second])
    for walk in range(6):
        batches = [turns.batch(5 * walk + k) for k in range(5)]
        assert [{k for _, k in batch} for batch in batches] == [{0}, {1}, {2}, {3}, {4}]
        assert len({tuple(position for position, _ in batch) for batch in batches}) == 1
        assert all((position >= 6) == (batches[0][0][0] >= 6) for position, _ in batches[0])
    assert sum(turns.batch(5 * walk)[0][0] >= 6 for walk in range(6)) == 3


@pytest.mark.parametrize(("steps", "told"), [((5, 7), "5 and 7"), ((1, 4), "1 and 4")])
def test_walks_of_other_lengths_do_not_take_turns(steps, told):
    orders = [mixed(kind="sequential", steps=length) for length in steps]
    with pytest.raises(
        SettingsError, match=f"caches whose trajectories have {told} steps, expected one number of steps"
    ):
        InterleavedSampler(orders)
    assert InterleavedSampler([mixed(steps=length) for length in steps]).batch(0)
