"""What a run asks of its caches, processes and transformer: refused before anything is loaded."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from secondcast.models.attention import RECORDED_NATIVE, check_attention, recorded_attention
from secondcast.models.memory.compiling import check_compiler
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.maintenance.rewrite import ways_made
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.mixture import TrainingCache, check_names, check_one_quantization, check_one_teacher
from secondcast.trainer.settings import MAIN, TrainSettings
from secondcast.trainer.stage import Stage


def check_caches(settings: TrainSettings, caches: Mapping[str, Cache], ranks: int) -> None:
    """Raise TeacherError or SettingsError for caches, by name, that do not make one run of these settings."""
    check_one_teacher(caches)
    check_one_quantization(caches)
    check_names(settings, list(caches))
    check_stages(settings, caches, ranks)


def check_stages(settings: TrainSettings, caches: Mapping[str, Cache], ranks: int) -> None:
    """Raise SettingsError, naming flag or stage, for what so many processes or these caches (by name) cannot give."""
    for stage in settings.stages:
        _check_divides(stage, ranks)
        for name in stage.caches or caches:
            _check_fits(stage, caches[name])
    if settings.teacher_use == "transformer" and settings.backbone_dtype == "cache":
        _check_one_dtype(caches)


def _check_one_dtype(caches: Mapping[str, Cache]) -> None:
    (first, one), *others = caches.items()
    for name, other in others:
        if (was := one.manifest.sampling.dtype) != (now := other.manifest.sampling.dtype):
            raise SettingsError(
                f"cache {first} was recorded in {was} and {name} in {now}: the transformer that replays both computes "
                f"in one of them; give --backbone-dtype {was} or {now}"
            )


def _check_divides(stage: Stage, ranks: int) -> None:
    unit = ranks * stage.grad_accum_steps * stage.timesteps_per_sample
    if stage.batch_size % unit:
        raise SettingsError(
            f"batch-size is {stage.batch_size} on {counted(ranks, 'process')}, expected a multiple of processes x "
            f"grad-accum-steps x timesteps-per-sample = {ranks} x {stage.grad_accum_steps} x {stage.timesteps_per_sample}: each "
            f"computes an equal part of a batch; take {max(1, stage.batch_size // unit) * unit}, or another number of "
            f"processes"
        )


def _check_fits(stage: Stage, cache: Cache) -> None:
    steps = cache.manifest.sampling.steps
    if stage.timesteps_per_sample > steps:
        raise SettingsError(
            f"--timesteps-per-sample is {stage.timesteps_per_sample}, the trajectories of {cache.folder} have "
            f"{counted(steps, 'step')}: as many different ones there are not; give at most {steps}"
        )
    if cache.manifest.sampling.storage.embeddings == "stored" or not stage.needs_embeddings:
        return
    if stage.name != MAIN and stage.replays:
        asked, what, way = (
            f"stage {stage.name} has embedding-loss-weight {stage.embedding_loss_weight:g}",
            "the term",
            "it none",
        )
    elif stage.name != MAIN:
        asked, what, way = f"stage {stage.name} has the loss {stage.loss}", "it", "stages of --loss vision alone"
    elif not stage.replays:
        asked, what, way = f"--loss is {stage.loss}", "this loss", "--loss vision"
    else:
        asked, what, way = (
            f"--embedding-loss-weight is {stage.embedding_loss_weight:g}",
            "the term",
            "--embedding-loss-weight 0",
        )
    raise SettingsError(
        f"{asked}, but {cache.folder} was built with --no-store-embeddings: {what} compares with the teacher's "
        f"embeddings; give {way}, or build with --store-embeddings"
    )


def check_backend(settings: TrainSettings, teacher: TeacherFolder, dtype: torch.dtype, device: torch.device) -> None:
    """Raise SettingsError, before weights are read, unless the attention backend and the compiler run here."""
    check_attention(settings.attention_backend, teacher.config("transformer"), dtype=dtype, device=device)
    if settings.compile:
        check_compiler(device)


def how_replayed(settings: TrainSettings) -> str:
    """As in "transformer with attention sdpa, compiled"."""
    compiled = ", compiled" if settings.compile else ""
    return f"transformer with attention {recorded_attention(settings.attention_backend)}{compiled}"


def remarks(settings: TrainSettings, training_caches: Sequence[TrainingCache]) -> Iterator[str]:
    """What the caches were recorded by and this run does not compute by; and that compiling takes its time."""
    now = recorded_attention(settings.attention_backend)
    for training_cache in training_caches:
        was = _recorded(training_cache.cache)
        if was - {now}:
            yield (
                f"{training_cache.cache.folder} was recorded with attention {', '.join(sorted(was))}, this run has {now}: the "
                f"replay error tells what the other rounding comes to"
            )
    if settings.compile:
        yield "the blocks of the transformer are compiled when a shape comes for the first time: about a minute each"


def _recorded(cache: Cache) -> set[str]:
    """The backends of the newest trajectories, which stand for all: a large cache is not read for this."""
    newest = max((shard for kind, shard in cache.records if kind == "trajectories"), default=None)
    if newest is None:
        return set()
    ways = ways_made(cache.records["trajectories", newest].provenance)
    return {str(way.get("attention", RECORDED_NATIVE)) for way in ways}
