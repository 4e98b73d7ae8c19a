"""Pilot: builds the first shards, checks the invariants on them and extrapolates time and size to the whole build."""

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
    """Measurements of one stage on the shards of the pilot, extrapolated to all rows of the build.

    seconds: work in the stage's main thread, from the records.
    raw_bytes, stored_bytes: size of these shards.
    """

    rows: int
    planned_rows: int
    seconds: float
    raw_bytes: int
    stored_bytes: int

    @property
    def seconds_per_row(self) -> float:
        """Seconds per trajectory, or per prompt."""
        return self.seconds / self.rows

    @property
    def ratio(self) -> float:
        """Ratio of stored to raw bytes."""
        return self.stored_bytes / self.raw_bytes

    @property
    def total_seconds(self) -> float:
        """Seconds for all rows with one worker."""
        return self.seconds_per_row * self.planned_rows

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of all rows."""
        return self.stored_bytes * self.planned_rows // self.rows


@dataclass(frozen=True, kw_only=True)
class PilotResult:
    """Result of a pilot. `peaks`: memory peaks of the stages that ran; empty if all shards existed before."""

    location: str
    text: Measured
    sample: Measured
    peaks: dict[str, PeakMemory]
    checks: tuple[EquivalenceCheck, ...]
    keeps_embeddings: bool

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of the finished cache."""
        return self.sample.total_bytes + (self.text.total_bytes if self.keeps_embeddings else 0)

    @property
    def holds(self) -> bool:
        """Whether no invariant is violated."""
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
    config = WorkerConfig.of(settings)
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
    # Before finish(), which drops embeddings that are not stored.
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
            f"{writer.folder} already has its first trajectories and does not store embeddings "
            f"(--no-store-embeddings): a pilot cannot check them; use `secondcast inspect verify {writer.folder} "
            f"--resample N`"
        )


def _equivalence_checks(
    writer: CacheWriter, builder: ShardBuilder, teacher: TeacherFolder, shard: ShardRange
) -> list[EquivalenceCheck]:
    cache = Cache.open(str(writer.folder))
    # The recorded batch size: another one may give other bits.
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
