"""Phase 1: prompts -> embeddings -> text encoder released -> trajectories -> shards."""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from secondcast.cache_builder.opening.open_build import open_build
from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.shard_builder import ShardBuilder
from secondcast.cache_builder.waiting import needed_embeddings, wait_for_embeddings
from secondcast.cache_builder.worker import Worker, WorkerConfig
from secondcast.models.memory.peak import PeakMemory
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.folders import Location
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.writer import CacheWriter


def build(
    location: Location,
    settings: BuildSettings,
    teacher: TeacherFolder,
    device: torch.device | None,
    progress: Progress,
    workers: "Workers | None" = None,
) -> "BuildResult":
    """Build a cache, or resume it; every committed shard stays, whatever happens.

    device: where this process computes; None where workers on Ray do.
    workers: who makes the shards: OneProcess (the default, for all of them), LocalWorkers or RayWorkers.
    """
    workers = workers or OneProcess(WorkerConfig.of(settings))
    if device is None and workers.compute_here:
        raise SettingsError(
            f"build has device None, expected a torch.device: {type(workers).__name__} computes on this machine; "
            f"None is for workers on Ray"
        )
    if settings.text_only and workers.config.stage == "sample":
        raise SettingsError(
            "--stage sample and --text-only cannot be combined: a text cache has no trajectories to sample; remove one "
            "of them"
        )
    samples = workers.config.stage != "text" and not settings.text_only
    cache = open_build(location, settings, teacher, device, progress, samples=samples)
    peaks = workers.build_shards(cache, teacher, device, progress)
    return finish(cache, peaks)


def build_shards(cache: CacheWriter, builder: ShardBuilder, config: WorkerConfig, progress: Progress) -> None:
    """Make the missing shards of one worker: first its embeddings, then its trajectories."""
    worker = config.worker
    if config.stage != "sample":
        builder.encode(worker.owned(cache.missing("embeddings")))
        builder.report_peak("text")
    if config.stage != "text" and (shards := worker.owned(cache.missing("trajectories"))):
        builder.release()
        # Where all workers only sample, others made the embeddings, not one worker per shard.
        makers = worker if config.stage == "all" else Worker()
        needed = needed_embeddings(cache, shards)
        wait_for_embeddings(cache, needed, makers, wait_seconds=config.wait_seconds, progress=progress)
        builder.sample(shards)
        builder.report_peak("sample")
    builder.release()


class Workers(Protocol):
    """Whoever makes the shards of a build.

    compute_here: whether they compute on this machine, on the device of the build.
    """

    compute_here: ClassVar[bool]

    @property
    def config(self) -> WorkerConfig:
        """Which part of the build they do."""

    def build_shards(
        self, cache: CacheWriter, teacher: TeacherFolder, device: torch.device | None, progress: Progress
    ) -> dict[str, PeakMemory]:
        """Commit the shards that these workers have to make; the largest peak memory of one of them, by stage."""


@dataclass(frozen=True)
class OneProcess:
    """The current process alone, or one of several that were started elsewhere."""

    config: WorkerConfig
    compute_here: ClassVar[bool] = True

    def build_shards(
        self, cache: CacheWriter, teacher: TeacherFolder, device: torch.device | None, progress: Progress
    ) -> dict[str, PeakMemory]:
        """See Workers."""
        assert device is not None  # build() has refused it
        builder = ShardBuilder(cache, teacher, self.config, device, progress)
        build_shards(cache, builder, self.config, progress)
        return builder.peaks


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What the cache holds now, and the peak memory of the stages that ran.

    finished: whether every shard is there.
    prompts: without a negative one, whose embedding is counted.
    """

    location: str
    finished: bool
    prompts: int
    embeddings: int
    planned_embeddings: int
    trajectories: int
    planned: int
    bytes: int
    peaks: dict[str, PeakMemory]


def finish(cache: CacheWriter, peaks: dict[str, PeakMemory]) -> BuildResult:
    """Finish the cache if every shard is committed, and count what it holds."""
    finished = cache.finish()
    records = cache.records()
    return BuildResult(
        location=str(cache.folder),
        finished=finished,
        prompts=cache.manifest.own_prompts,
        embeddings=records.rows("embeddings"),
        planned_embeddings=len(cache.prompts),
        trajectories=records.rows("trajectories"),
        planned=len(cache.layout),
        bytes=records.bytes,
        peaks=peaks,
    )
