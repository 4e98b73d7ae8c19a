"""Which trajectory lies where: arithmetic over the generations of a manifest, nothing is stored."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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


class Shards(Sequence[ShardRange]):
    """Shards of one kind, computed when asked for: a large cache has tens of thousands."""

    def __init__(self, parts: Sequence[tuple[int, int]]) -> None:
        """`parts`: number of items and shard size of each generation; no shard holds items of two."""
        self._parts = tuple(parts)
        self._first_shards = [0, *accumulate(-(-count // size) for count, size in parts)]
        self._first_items = [0, *accumulate(count for count, _ in parts)]

    def __len__(self) -> int:
        return self._first_shards[-1]

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # one shard or a slice of them
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = bisect_right(self._first_shards, index) - 1
        count, size = self._parts[part]
        begin = (index - self._first_shards[part]) * size
        first = self._first_items[part] + begin
        return ShardRange(shard=index, generation=part, first=first, rows=min(size, count - begin))

    @property
    def items(self) -> int:
        """Items in all shards."""
        return self._first_items[-1]

    def holding(self, item: int) -> ShardRange:
        """The shard of an item; IndexError outside."""
        if not 0 <= item < self.items:
            raise IndexError(item)
        part = bisect_right(self._first_items, item) - 1
        return self[self._first_shards[part] + (item - self._first_items[part]) // self._parts[part][1]]


class Layout:
    """Shards of a cache: for trajectories, and for embeddings (one per prompt, in prompt order)."""

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._generations = tuple(generations)
        self.trajectories = Shards([(g.prompts * g.replicas, g.shard_size) for g in generations])
        # A generation that only adds replicas brings no new prompts, hence no new embeddings.
        known = 0
        new_prompts = []
        for generation in generations:
            end = generation.first_prompt + generation.prompts
            new_prompts.append((max(0, end - known), generation.shard_size))
            known = max(known, end)
        self.embeddings = Shards(new_prompts)

    def __len__(self) -> int:
        """Number of trajectories asked for: N."""
        return self.trajectories.items

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
        shard = self.embeddings.holding(prompt)
        return shard.shard, prompt - shard.first

    @property
    def shard_size(self) -> int:
        """Rows that a shard has room for."""
        return self._generations[0].shard_size
