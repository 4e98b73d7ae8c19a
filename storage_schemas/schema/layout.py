"""Maps trajectories to shards and rows, computed from the segments of a manifest; nothing is stored."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.manifest import Segment


@dataclass(frozen=True, kw_only=True)
class RowLocation:
    """Origin (prompt, sample) and location (shard, row within the shard) of a trajectory."""

    prompt: int
    sample_index: int
    shard: int
    row: int


@dataclass(frozen=True, kw_only=True)
class ShardRange:
    """The items (trajectories, or prompts) of a shard: [first, first + rows)."""

    shard: int
    segment: int
    first: int
    rows: int


class Shards(Sequence[ShardRange]):
    """Shards of one kind, computed on access: a large cache has tens of thousands."""

    def __init__(self, parts: Sequence[tuple[int, int]]) -> None:
        """`parts`: number of items and shard size of each segment; no shard has items of two segments."""
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
        return ShardRange(shard=index, segment=part, first=first, rows=min(size, count - begin))

    @property
    def items(self) -> int:
        """Number of items in all shards."""
        return self._first_items[-1]

    def holding(self, item: int) -> ShardRange:
        """The shard of an item; IndexError outside."""
        if not 0 <= item < self.items:
            raise IndexError(item)
        part = bisect_right(self._first_items, item) - 1
        return self[self._first_shards[part] + (item - self._first_items[part]) // self._parts[part][1]]


class Layout:
    """Shards of a cache: for trajectories, and for embeddings (one per prompt, in prompt order)."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = tuple(segments)
        counts = [g.prompts * g.samples_per_prompt for g in segments]
        shards = [-(-count // g.shard_size) for count, g in zip(counts, segments, strict=True)]
        self._firsts = [0, *accumulate(counts)][:-1]
        self._first_shards = [0, *accumulate(shards)][:-1]
        self.trajectories = Shards([(count, g.shard_size) for count, g in zip(counts, segments, strict=True)])
        # A segment that only adds samples has no new prompts, hence no new embeddings.
        known = 0
        new_prompts = []
        for segment in segments:
            end = segment.first_prompt + segment.prompts
            new_prompts.append((max(0, end - known), segment.shard_size))
            known = max(known, end)
        self.embeddings = Shards(new_prompts)
        # The negative prompt of classifier-free guidance has no trajectories, and all others need its embedding.
        self._always = {0} if len(self) and not segments[0].samples_per_prompt else set[int]()

    def __len__(self) -> int:
        """Number of planned trajectories N."""
        return self.trajectories.items

    @property
    def rows(self) -> tuple[Kind, Shards]:
        """What a run trains on, and its shards: trajectories; in a text cache, which plans none, embeddings."""
        return ("trajectories", self.trajectories) if len(self) else ("embeddings", self.embeddings)

    def place(self, index: int) -> RowLocation:
        """Locate trajectory `index` (0 .. N-1); IndexError outside."""
        if 0 <= index < len(self):
            number = bisect_right(self._firsts, index) - 1
            segment = self._segments[number]
            local = index - self._firsts[number]
            sample_index, prompt = divmod(local, segment.prompts)
            shard, row = divmod(local, segment.shard_size)
            return RowLocation(
                prompt=segment.first_prompt + prompt,
                sample_index=segment.first_sample + sample_index,
                shard=self._first_shards[number] + shard,
                row=row,
            )
        raise IndexError(f"trajectory {index} of {len(self)}")

    def find(self, prompt: int, sample_index: int) -> int | None:
        """Index of the trajectory of a prompt and sample, the inverse of `place`; None if it is not planned."""
        for first, segment in zip(self._firsts, self._segments, strict=True):
            row, column = sample_index - segment.first_sample, prompt - segment.first_prompt
            if 0 <= row < segment.samples_per_prompt and 0 <= column < segment.prompts:
                return first + row * segment.prompts + column
        return None

    def embedding_place(self, prompt: int) -> tuple[int, int]:
        """Shard and row of the embedding of prompt number `prompt`; IndexError outside."""
        shard = self.embeddings.holding(prompt)
        return shard.shard, prompt - shard.first

    def embedding_shards_of(self, shard: ShardRange) -> set[int]:
        """Numbers of the embedding shards with the prompts of a trajectory shard, and with the negative prompt."""
        segment, begin = self._segments[shard.segment], self.place(shard.first).prompt
        end = segment.first_prompt + segment.prompts
        # A shard may wrap around to the first prompts, of the next sample.
        after = segment.first_prompt + min(segment.prompts, max(0, begin + shard.rows - end))
        parts = ((begin, min(end, begin + shard.rows)), (segment.first_prompt, after))
        return self._always | {
            number
            for first, last in parts
            if first < last
            for number in range(self.embedding_place(first)[0], self.embedding_place(last - 1)[0] + 1)
        }

    @property
    def shard_size(self) -> int:
        """Largest number of rows of a shard."""
        return self._segments[0].shard_size
