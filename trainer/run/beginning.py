"""The beginning of a run: what identifies it, and whether it resumes one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from secondcast.models.teacher.context_projection import ContextProjection
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.hub import split_revision
from secondcast.storage_schemas.errors import RunError
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.distributed.processes import Distributed
from secondcast.trainer.run.config import RecordedWith, RunConfig, TrainedOn
from secondcast.trainer.run.folder import create_run, find_run, lock_run, resumed_settings
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.training_set import TrainingSet


def run_config(
    settings: TrainSettings, caches: Mapping[str, Cache], teacher: TeacherFolder | ContextProjection | None
) -> RunConfig:
    """What config.json states of a run that begins now."""
    manifests = [cache.manifest for cache in caches.values()]
    sampled = [manifest for manifest in manifests if not manifest.is_text]
    guidance = {value for manifest in sampled for value in manifest.sampling.guidance or ()}
    first = manifests[0]
    return RunConfig(
        settings=settings,
        caches={
            name: TrainedOn(
                location=cache.location,
                sampling_digest=cache.manifest.recording_digest(),
                training_set=TrainingSet.of(cache),
            )
            for name, cache in caches.items()
        },
        backbone=teacher.source if teacher is not None else split_revision(first.source)[0],
        teacher_digest=first.digests()["teacher"],
        text_length=first.teacher.text_length,
        text_width=first.teacher.text_width,
        guidance=tuple(sorted(guidance)) or None,
        family=first.teacher.family,
        recorded=RecordedWith.of(sampled[0]) if sampled else None,
    )


def find_begun(run: Path, wanted: RunConfig, processes: Distributed) -> RunConfig | None:
    """How the run was begun that this one resumes, the same in all processes; None for a new run."""

    # The others would look while the first one makes the folder.
    def look() -> str | None:
        found = find_run(run, wanted)
        return None if found is None else found.model_dump_json()

    found = processes.broadcast_from_rank0(look)
    return None if found is None else RunConfig.model_validate_json(found)


@contextmanager
def opened_run(
    run: Path,
    config: RunConfig,
    begun: RunConfig | None,
    processes: Distributed,
    budgeted: Callable[[], TrainSettings],
) -> Iterator[TrainSettings]:
    """Lock a run folder, and create the run unless it resumes one; gives its final settings.

    budgeted: called for a new run; the settings with steps in place of shares of a time budget.

    Raises RunError where another process trains in the folder, or has begun the run since it was looked for.
    """
    with ExitStack() as stack:
        # Before anything is written: config.json may be that of another process that trains.
        processes.broadcast_from_rank0(lambda: stack.enter_context(lock_run(run)))
        if begun is not None:
            yield resumed_settings(begun, config.settings)
            return
        if find_begun(run, config, processes) is not None:
            raise RunError(f"another process has started to train in {run}: give the same command again to resume it")
        settings = budgeted()
        processes.broadcast_from_rank0(lambda: create_run(run, config.model_copy(update={"settings": settings})))
        yield settings
