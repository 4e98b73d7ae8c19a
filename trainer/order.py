"""The order of training: a pure function of (seed, epoch, position). Nothing is stored.

A Feistel network over the positions of an epoch, walked until it lands inside (cycle walking), is a
permutation that gives any element without the others: resume and random access are arithmetic.
"""

from dataclasses import dataclass

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
    """Where a random permutation of range(count) sends `position`."""
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


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which trajectories and which of their steps an optimizer step sees.

    kind "shuffled": steps drawn at random over trajectories; `share` rows in a row are different steps of one of
    them. "following": the paper's: one batch of trajectories walked from the first step to the last, one optimizer
    step each. `count` trajectories, `steps` = K.
    """

    kind: str
    count: int
    steps: int
    batch_size: int
    seed: int
    share: int = 1

    def __post_init__(self) -> None:
        if self.share > 1 and self.kind != "shuffled":
            raise ValueError(f"share is {self.share} in the order {self.kind!r}, expected 1: only shuffled shares")
        if self.batch_size % self.share or self.share > self.steps:
            raise ValueError(
                f"share is {self.share}, expected a divisor of the batch size {self.batch_size}, at most {self.steps}"
            )

    def batch(self, optimizer_step: int) -> list[tuple[int, int]]:
        """(position of the trajectory in 0 .. count-1, k) for each row of the batch."""
        if self.kind == "following":
            walk, k = divmod(optimizer_step, self.steps)
            return [(self._trajectory(walk * self.batch_size + row), k) for row in range(self.batch_size)]
        items = self.batch_size // self.share
        first = optimizer_step * items
        return [(self._trajectory(item), k) for item in range(first, first + items) for k in self._steps(item)]

    def rank_batch(self, optimizer_step: int, *, rank: int, ranks: int) -> list[tuple[int, int]]:
        """Rows of process `rank` of `ranks`: an equal part of the batch; in rank order the parts are the batch.

        ValueError unless the batch divides by `ranks`: then which rows a step sees would depend on their number.
        """
        if self.batch_size % ranks:
            raise ValueError(f"batch size is {self.batch_size}, expected a multiple of the {ranks} processes")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}, expected 0 to {ranks - 1}")
        rows = self.batch_size // ranks
        if rows % self.share:
            raise ValueError(f"{rows} rows of a process, expected a multiple of the {self.share} steps that share one")
        return self.batch(optimizer_step)[rank * rows : (rank + 1) * rows]

    def _steps(self, item: int) -> list[int]:
        if self.share == 1:
            return [mix(self.seed, item, self.steps) % self.steps]
        return [
            shuffled_position(turn, count=self.steps, seed=self.seed, epoch=mix(item, self.steps))
            for turn in range(self.share)
        ]

    def _trajectory(self, item: int) -> int:
        epoch, position = divmod(item, self.count)
        return shuffled_position(position, count=self.count, seed=self.seed, epoch=epoch)
