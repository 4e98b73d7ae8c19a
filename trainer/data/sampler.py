"""The data order: a pure function of (seed, epoch, position). Nothing is stored.

A Feistel network over the positions of an epoch, applied until the result is in range (cycle walking), is a
permutation that gives any element without the others: resume and random access are arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from secondcast.storage_schemas.errors import SettingsError
from secondcast.trainer.stage import OrderKind

Row = tuple[int, int]
"""Position of a trajectory in a ReplayDataset, and its step k."""

_ROUNDS = 6
_WORD = (1 << 64) - 1


def mix(*parts: int) -> int:
    """Hash of integers, 64 bit: the finaliser of splitmix64 (Steele, Lea, Flood 2014) chained over them."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def shuffled_position(position: int, *, count: int, seed: int, epoch: int) -> int:
    """The image of `position` under a random permutation of range(count)."""
    if not 0 <= position < count:
        raise ValueError(f"position is {position}, expected 0 to {count - 1}")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [mix(seed, epoch, turn) for turn in range(_ROUNDS)]
    value = position
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (mix(key, right) & mask)
        value = (left << half) | right
        if value < count:
            return value


def proportional_turn(turn: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """The index that gets turn `turn` when turns are distributed in proportion to shares, and its previous turns.

    After any number of turns, the count of index i deviates from its proportional share by at most i + 1 turns.
    """
    left = sum(shares, start=Fraction(0))
    for who, share in enumerate(shares[:-1]):
        before = floor(turn * share / left)
        if floor((turn + 1) * share / left) > before:
            return who, before
        turn, left = turn - before, left - share
    return len(shares) - 1, turn


@dataclass(frozen=True, kw_only=True)
class Part:
    """The trajectories of one cache: positions first .. first+count-1, and their share of the rows."""

    count: int
    first: int = 0
    share: Fraction = Fraction(1)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Selects the trajectories and timesteps of each optimizer step.

    kind: "shuffled": random steps of shuffled trajectories; `timesteps_per_sample` consecutive rows are different steps
        of one trajectory. "sequential", as in the paper: a batch of trajectories from the first step to the last, one
        step per optimizer step.
    parts: caches that a batch may mix, all with K = `steps` steps.
    """

    kind: OrderKind
    parts: tuple[Part, ...]
    steps: int
    batch_size: int
    seed: int
    timesteps_per_sample: int = 1

    def __post_init__(self) -> None:
        if self.timesteps_per_sample > 1 and self.kind != "shuffled":
            raise ValueError(
                f"timesteps_per_sample is {self.timesteps_per_sample} in the order {self.kind!r}, expected 1 or the "
                f"order 'shuffled'"
            )
        if self.batch_size % self.timesteps_per_sample or self.timesteps_per_sample > self.steps:
            raise ValueError(
                f"timesteps_per_sample is {self.timesteps_per_sample}, expected a divisor of the batch size "
                f"{self.batch_size}, at most {self.steps}"
            )

    def batch(self, optimizer_step: int) -> list[Row]:
        """(position of the trajectory, k) for each row of the batch."""
        if self.kind == "sequential":
            walk, k = divmod(optimizer_step, self.steps)
            return [(self._trajectory(walk * self.batch_size + row), k) for row in range(self.batch_size)]
        items = self.batch_size // self.timesteps_per_sample
        first = optimizer_step * items
        return [(self._trajectory(item), k) for item in range(first, first + items) for k in self._steps(item)]

    def _steps(self, item: int) -> list[int]:
        if self.timesteps_per_sample == 1:
            return [mix(self.seed, item, self.steps) % self.steps]
        return [
            shuffled_position(turn, count=self.steps, seed=self.seed, epoch=mix(item, self.steps))
            for turn in range(self.timesteps_per_sample)
        ]

    def _trajectory(self, item: int) -> int:
        which, item = proportional_turn(item, [part.share for part in self.parts])
        part = self.parts[which]
        epoch, position = divmod(item, part.count)
        # The first part has the same order as without the others.
        seed = mix(self.seed, which) if which else self.seed
        return part.first + shuffled_position(position, count=part.count, seed=seed, epoch=epoch)


class InterleavedSampler:
    """Alternates between samplers in proportion to their shares, for caches that a batch cannot mix.

    With the order "sequential" a turn is a whole trajectory; SettingsError unless all have the same number of steps.
    """

    def __init__(self, orders: Sequence[Sampler]) -> None:
        self._orders = orders
        self._shares = [sum((part.share for part in order.parts), start=Fraction(0)) for order in orders]
        self._walk = orders[0].steps if orders[0].kind == "sequential" else 1
        lengths = sorted({order.steps for order in orders})
        if orders[0].kind == "sequential" and len(lengths) > 1:
            raise SettingsError(
                f"data-order is sequential on caches whose trajectories have {' and '.join(map(str, lengths))} steps, "
                f"expected one number of steps: give each cache its own stage, or use data-order shuffled"
            )

    def batch(self, optimizer_step: int) -> list[Row]:
        """(position of the trajectory, k) for each row of the batch."""
        walk, k = divmod(optimizer_step, self._walk)
        who, before = proportional_turn(walk, self._shares)
        return self._orders[who].batch(before * self._walk + k)


def rank_slice(rows: Sequence[Row], *, rank: int, ranks: int, rows_per_pass: int) -> Sequence[Row]:
    """Rows of process `rank` of `ranks`: an equal part of the batch; the parts in rank order are the batch.

    ValueError unless the batch divides by `ranks`, because the rows of a step must not depend on `ranks`.
    """
    if len(rows) % (ranks * rows_per_pass):
        raise ValueError(
            f"batch of {len(rows)} rows, expected a multiple of {ranks} processes x {rows_per_pass} rows per forward "
            f"pass"
        )
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank}, expected 0 to {ranks - 1}")
    size = len(rows) // ranks
    return rows[rank * size : (rank + 1) * size]
