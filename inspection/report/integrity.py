"""Integrity section of a report: every file compared with its checksum, with the repair command of each problem."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from secondcast.inspection.repairing import repair_command
from secondcast.storage_schemas.errors import DamagedCacheError
from secondcast.storage_schemas.io.folders import open_folder
from secondcast.storage_schemas.maintenance.verify import verify
from secondcast.storage_schemas.progress import Progress, counted, size_text
from secondcast.storage_schemas.reader import Cache, read_manifest
from secondcast.storage_schemas.record import Trajectory
from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.fields import fields_of

# Trajectories kept in memory, so that norms and film strips of a small cache need one read.
_REMEMBERED_BYTES = 256 * 2**20

NOT_CHECKED: dict[str, Any] = {
    "state": "not checked",
    "text": "checksums were not compared: --no-verify-checksums",
    "problems": [],
}


@dataclass(frozen=True, kw_only=True)
class Readable:
    """A cache whose damaged shards are not read."""

    cache: Cache
    damaged: frozenset[tuple[Kind, int]]
    _remembered: dict[int, Trajectory | None] = field(default_factory=dict)

    def trajectory(self, index: int) -> Trajectory | None:
        """Trajectory number `index`; None if its shard is damaged. In a small cache each is read once."""
        if index in self._remembered:
            return self._remembered[index]
        found = self._read(index)
        if self._row_bytes * (len(self._remembered) + 1) <= _REMEMBERED_BYTES:
            self._remembered[index] = found
        return found

    @cached_property
    def _row_bytes(self) -> int:
        sizes = {stored.name: stored.row_bytes for stored in fields_of(self.cache.manifest, "trajectories")}
        # Derived latents stay with the trajectory, and are as large as its velocities.
        return sum(sizes.values()) + (0 if "hidden_states" in sizes else sizes["velocity"])

    def _read(self, index: int) -> Trajectory | None:
        if ("trajectories", self.cache.layout.place(index).shard) in self.damaged:
            return None
        try:
            return self.cache.trajectory(index)
        except DamagedCacheError:
            return None

    def has_embedding(self, prompt: int) -> bool:
        """Whether the embedding of a prompt exists and is readable."""
        if self.cache.manifest.sampling.storage.embeddings == "none":
            return False
        key: tuple[Kind, int] = ("embeddings", self.cache.layout.embedding_place(prompt)[0])
        if key in self.damaged or key not in self.cache.records:
            return False
        try:
            self.cache.embedding(prompt)
        except DamagedCacheError:
            return False
        return True


def damaged_places(cache: Cache, damaged: frozenset[tuple[Kind, int]], indices: Sequence[int]) -> list[int]:
    """Table rows whose shard is damaged; indices: trajectory index of each row."""
    return [row for row, at in enumerate(indices) if ("trajectories", cache.layout.place(at).shard) in damaged]


def check_files(location: str, progress: Progress) -> tuple[dict[str, Any], frozenset[tuple[Kind, int]]]:
    """State, text and problems of a cache's files, and the damaged shards."""
    found = verify(location, progress)
    source = read_manifest(open_folder(location)).source
    summary = f"{counted(found.shards, 'shard')}, {size_text(found.bytes)}"
    summary += f", {found.missing:,} not built yet" if found.missing else ""
    count = len(found.problems)
    state = "damaged" if count else "intact"
    text = f"{summary}: {counted(count, 'problem')}" if count else f"{summary}: every file matches its checksum"
    problems = [
        {"path": problem.path, "problem": problem.message, "repair": repair_command(location, problem, found, source)}
        for problem in found.problems
    ]
    damaged = frozenset(problem.shard for problem in found.problems if problem.shard is not None)
    return {"state": state, "text": text, "problems": problems}, damaged
