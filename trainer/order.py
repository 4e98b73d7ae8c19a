"""The order of training: a pure function of (seed, epoch, position). Nothing is stored.

A Feistel network over the positions of an epoch, walked until it lands inside (cycle walking), is a
permutation that gives any element without the others: resume and random access are arithmetic.
"""

import hashlib
from dataclasses import dataclass

_ROUNDS = 6


def _mix(*parts: int) -> int:
    data = b"".join(part.to_bytes(8, "little") for part in parts)
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def shuffled_position(position: int, *, count: int, seed: int, epoch: int) -> int:
    """Where a random permutation of range(count) sends `position`."""
    if not 0 <= position < count:
        raise ValueError(f"position is {position}, expected 0 to {count - 1}")
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(seed, epoch, turn, right) & mask)
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
            (self._trajectory(item), _mix(self.seed, item, self.steps) % self.steps)
            for item in range(first, first + self.batch_size)
        ]

    def _trajectory(self, item: int) -> int:
        epoch, position = divmod(item, self.count)
        return shuffled_position(position, count=self.count, seed=self.seed, epoch=epoch)
