"""The rows of a cache that a run trains on: those committed when the run started, not later extensions.

Rows are trajectories; in a text cache, prompts.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Self

import numpy as np

from secondcast.storage_schemas.errors import RunError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.first_difference import first_difference
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import Segment
from secondcast.storage_schemas.schema.prompts import ids_digest


class TrainingSet(Record):
    """The committed rows of a cache, including held-out ones; the data order is defined over them.

    prompts: number of prompts.
    prompt_ids: digest of the prompt ids.
    shards: ranges [first, end) of the shards with the rows.
    """

    prompts: int
    prompt_ids: str
    segments: tuple[Segment, ...]
    shards: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, cache: Cache) -> Self:
        """The rows that are committed now."""
        stated, (rows, _) = cache.manifest.prompts, cache.layout.rows
        return cls(
            prompts=stated.count,
            prompt_ids=stated.ids,
            segments=stated.segments,
            shards=tuple(_ranges(sorted(shard for kind, shard in cache.records if kind == rows))),
        )

    def indices(self) -> Array:
        """Indices of the rows, ascending, int64; unchanged by later extensions of the cache."""
        _, shards = Layout(self.segments).rows
        # Shards are consecutive, so a range of shards holds a range of rows.
        ranges = [
            np.arange(shards[first].first, shards[end - 1].first + shards[end - 1].rows) for first, end in self.shards
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *ranges])

    def check(self, cache: Cache, run: Path) -> None:
        """Raise RunError with the change unless a cache still holds all rows under the same indices."""
        if changed := next(self._changes(cache), None):
            raise RunError(
                f"{run} was started on {changed}: the data order depends on it; give the original cache, or a new run "
                f"folder"
            )

    def _changes(self, cache: Cache) -> Iterator[str]:
        there, (rows, _) = cache.manifest.prompts, cache.layout.rows
        was, now = ([g.json_value() for g in made] for made in (self.segments, there.segments))
        # An extension only appends.
        if was != now[: len(was)]:
            first = first_difference(was, now[: len(was)], "segments")
            yield f"a cache with {first.path} = {first.one}, {cache.folder} has {first.other}"
            return
        same_count = self.prompts == there.count
        ids = there.ids if same_count else ids_digest(cache.prompts[i].id for i in range(self.prompts))
        if self.prompt_ids != ids:
            yield f"{counted(self.prompts, 'prompt')} of digest {self.prompt_ids}, those of {cache.folder} have {ids}"
        shards = (shard for first, end in self.shards for shard in range(first, end))
        lost = next((shard for shard in shards if (rows, shard) not in cache.records), None)
        if lost is not None:
            known = counted(len(self.indices()), row_name(cache))
            yield f"{known}, of which {cache.folder} lacks those of shard {lost}"


def row_name(cache: Cache) -> str:
    """What a row of a cache is called."""
    return "prompt" if cache.manifest.is_text else "trajectory"


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """The runs of neighbours among ascending numbers, as [first, end)."""
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield run[0], run[-1] + 1
