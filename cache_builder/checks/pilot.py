"""A pilot: the first shards of a real build, the invariants checked on them, and what the whole will take from there."""

from dataclasses import dataclass

import torch

from secondcast.cache_builder.checks.equivalence import EquivalenceCheck, check_equivalence
from secondcast.cache_builder.opening.open_build import open_build
from secondcast.cache_builder.provenance import recorded_batch_size
from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.shard_builder import ShardBuilder
from secondcast.cache_builder.waiting import needed_embeddings
from secondcast.cache_builder.worker import WorkerConfig
from secondcast.models.memory.peak import PeakMemory
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import NotInCacheError
from secondcast.storage_schemas.io.folders import Location
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import CommitRecord, Kind, Records, committed_shards
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.writer import CacheWriter


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One stage on the shards of the pilot, which are kept, and the same rate over all rows of the build.

    seconds: of work in the stage's main thread, by the records. raw_bytes, stored_bytes: of these shards.
    """

    rows: int
    planned_rows: int
    seconds: float
    raw_bytes: int
    stored_bytes: int

    @property
    def seconds_per_row(self) -> float:
        """Of a trajectory, or of a prompt."""
        return self.seconds / self.rows

    @property
    def ratio(self) -> float:
        """Stored bytes by raw bytes."""
        return self.stored_bytes / self.raw_bytes

    @property
    def total_seconds(self) -> float:
        """Of all rows, by one worker."""
        return self.seconds_per_row * self.planned_rows

    @property
    def total_bytes(self) -> int:
        """Of all rows, on disk."""
        return self.stored_bytes * self.planned_rows // self.rows


@dataclass(frozen=True, kw_only=True)
class PilotResult:
    """What a pilot found. `peaks`: by stage, of those that ran now; empty where all shards were there before."""

    location: str
    text: Measured
    sample: Measured
    peaks: dict[str, PeakMemory]
    checks: tuple[EquivalenceCheck, ...]
    keeps_embeddings: bool

    @property
    def total_bytes(self) -> int:
        """Of the finished cache, on disk."""
        return self.sample.total_bytes + (self.text.total_bytes if self.keeps_embeddings else 0)

    @property
    def holds(self) -> bool:
        """Whether no invariant was broken."""
        return all(check.holds is not False for check in self.checks)


def run_pilot(
    location: Location,
    settings: BuildSettings,
    teacher: TeacherFolder,
    device: torch.device,
    progress: Progress,
    *,
    count: int,
) -> PilotResult:
    """Build the first shards with at least `count` trajectories, and check invariants 1 to 3 on the first batch."""
    writer = open_build(location, settings, teacher, device, progress)
    config = WorkerConfig(batch_size=settings.batch_size, attention_backend=settings.attention_backend)
    builder = ShardBuilder(writer, teacher, config, device, progress)
    shards = _first_shards(writer, count)
    text_shards = needed_embeddings(writer, shards)
    progress.say(
        f"pilot: {counted(sum(shard.rows for shard in shards), 'trajectory')} in {counted(len(shards), 'whole shard')}"
    )
    builder.encode(_missing(writer, "embeddings", text_shards))
    builder.sample(_missing(writer, "trajectories", shards))
    peaks = dict(builder.peaks)
    _check_embeddings(writer, text_shards)
    checks = _equivalence_checks(writer, builder, teacher, shards[0])
    # Before the end, which drops embeddings that are not kept.
    records = writer.records()
    writer.finish()
    return PilotResult(
        location=str(writer.folder),
        text=_measured(records, "embeddings", text_shards, len(writer.prompts)),
        sample=_measured(records, "trajectories", shards, len(writer.layout)),
        peaks=peaks,
        checks=tuple(checks),
        keeps_embeddings=settings.store_embeddings,
    )


def _first_shards(writer: CacheWriter, count: int) -> list[ShardRange]:
    shards: list[ShardRange] = []
    for shard in writer.layout.trajectories:
        shards.append(shard)
        if sum(part.rows for part in shards) >= count:
            break
    return shards


def _missing(writer: CacheWriter, kind: Kind, shards: list[ShardRange]) -> list[ShardRange]:
    missing = {shard.shard for shard in writer.missing(kind)}
    return [shard for shard in shards if shard.shard in missing]


def _check_embeddings(writer: CacheWriter, shards: list[ShardRange]) -> None:
    there = committed_shards(writer.folder, "embeddings")
    if any(shard.shard not in there for shard in shards):
        raise NotInCacheError(
            f"{writer.folder} has its first trajectories already and keeps no embeddings (--no-store-embeddings): a pilot "
            f"has nothing to check them with; `secondcast inspect verify {writer.folder} --resample N` does it anew"
        )


def _equivalence_checks(
    writer: CacheWriter, builder: ShardBuilder, teacher: TeacherFolder, shard: ShardRange
) -> list[EquivalenceCheck]:
    cache = Cache.open(str(writer.folder))
    # The batch size of the recording: in another one other bits may be right.
    size = recorded_batch_size(cache.records["trajectories", shard.shard].provenance)
    indices = range(shard.first, shard.first + min(size, shard.rows))
    return check_equivalence(cache, builder.backbone(), teacher, indices)


def _measured(records: Records, kind: Kind, shards: list[ShardRange], planned_rows: int) -> Measured:
    found: list[CommitRecord] = [records[kind, shard.shard] for shard in shards]
    return Measured(
        rows=sum(record.rows for record in found),
        planned_rows=planned_rows,
        seconds=sum(record.seconds for record in found),
        raw_bytes=sum(record.raw_bytes for record in found),
        stored_bytes=sum(file.bytes for record in found for file in record.files),
    )
