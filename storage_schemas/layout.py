"""Which trajectory lies where: arithmetic over the generations of a manifest, nothing is stored."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from storage_schemas.manifest import Generation


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where trajectory i comes from and lies: `row` counts within the shard."""

    prompt: int
    replica: int
    shard: int
    row: int


@dataclass(frozen=True, kw_only=True)
class ShardRange:
    """The items (trajectories, or prompts) that a shard holds: [first, first + rows)."""

    shard: int
    generation: int
    first: int
    rows: int


class Layout:
    """Shards of a cache: for trajectories, and for embeddings (one per prompt, in prompt order)."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._generations = tuple(generations)
        self.trajectories = _cut([(g.prompts * g.replicas, g.shard_size) for g in generations])
        # A generation that only adds replicas brings no new prompts, hence no new embeddings.
        known = 0
        new_prompts = []
        for generation in generations:
            end = generation.first_prompt + generation.prompts
            new_prompts.append((max(0, end - known), generation.shard_size))
            known = max(known, end)
        self.embeddings = _cut(new_prompts)
        self._embedding_starts = [shard.first for shard in self.embeddings]

    def __len__(self) -> int:
        """Number of trajectories asked for: N."""
        last = self.trajectories[-1]
        return last.first + last.rows

    def place(self, index: int) -> Place:
        """Where trajectory `index` (0 .. N-1) lies; IndexError outside."""
        first = 0
        first_shard = 0
        for generation in self._generations:
            count = generation.prompts * generation.replicas
            if 0 <= index - first < count:
                local = index - first
                replica, prompt = divmod(local, generation.prompts)
                shard, row = divmod(local, generation.shard_size)
                return Place(
                    prompt=generation.first_prompt + prompt,
                    replica=generation.first_replica + replica,
                    shard=first_shard + shard,
                    row=row,
                )
            first += count
            first_shard += -(-count // generation.shard_size)
        raise IndexError(f"trajectory {index} of {len(self)}")

    def embedding_place(self, prompt: int) -> tuple[int, int]:
        """Shard and row of the embedding of prompt number `prompt`; IndexError outside."""
        shard = self.embeddings[bisect_right(self._embedding_starts, prompt) - 1]
        if not 0 <= prompt - shard.first < shard.rows:
            raise IndexError(f"prompt {prompt}")
        return shard.shard, prompt - shard.first

    @property
    def shard_size(self) -> int:
        """Rows that a shard has room for."""
        return self._generations[0].shard_size


def _cut(parts: Sequence[tuple[int, int]]) -> list[ShardRange]:
    shards: list[ShardRange] = []
    first = 0
    for generation, (count, size) in enumerate(parts):
        for begin in range(0, count, size):
            rows = min(size, count - begin)
            shards.append(ShardRange(shard=len(shards), generation=generation, first=first, rows=rows))
            first += rows
    return shards
