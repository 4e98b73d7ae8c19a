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

    kind "shuffled": steps drawn at random over trajectories. "following": the paper's: one batch of trajectories
    walked from the first step to the last, one optimizer step each. `count` trajectories, `steps` = K.
    """

    kind: str
    count: int
    steps: int
    batch_size: int
    seed: int

    def batch(self, optimizer_step: int) -> list[tuple[int, int]]:
        """(position of the trajectory in 0 .. count-1, k) for each row of the batch."""
        if self.kind == "following":
            walk, k = divmod(optimizer_step, self.steps)
            return [(self._trajectory(walk * self.batch_size + row), k) for row in range(self.batch_size)]
        first = optimizer_step * self.batch_size
        return [
            (self._trajectory(item), mix(self.seed, item, self.steps) % self.steps)
            for item in range(first, first + self.batch_size)
        ]

    def rank_batch(self, optimizer_step: int, *, rank: int, ranks: int) -> list[tuple[int, int]]:
        """Rows of process `rank` of `ranks`: an equal part of the batch; in rank order the parts are the batch.

        ValueError unless the batch divides by `ranks`: then which rows a step sees would depend on their number.
        """
        if self.batch_size % ranks:
            raise ValueError(f"batch size is {self.batch_size}, expected a multiple of the {ranks} processes")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank is {rank}, expected 0 to {ranks - 1}")
        rows = self.batch_size // ranks
        return self.batch(optimizer_step)[rank * rows : (rank + 1) * rows]

    def _trajectory(self, item: int) -> int:
        epoch, position = divmod(item, self.count)
        return shuffled_position(position, count=self.count, seed=self.seed, epoch=epoch)
