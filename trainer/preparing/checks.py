"""Checks of a run's caches, processes and transformer, before anything is loaded."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from secondcast.models.attention import NATIVE, RECORDED_NATIVE, check_attention, recorded_attention
from secondcast.models.families.registry import family_named
from secondcast.models.memory.compiling import check_compiler
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.maintenance.rewrite import ways_made
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.mixture import TrainingCache, check_one_quantization, check_one_teacher
from secondcast.trainer.losses.vision import LossFunction, function_name
from secondcast.trainer.settings import MAIN, TrainSettings
from secondcast.trainer.stage import Stage


def check_caches(settings: TrainSettings, caches: Mapping[str, Cache], ranks: int) -> None:
    """Raise TeacherError or SettingsError for caches, by name, that do not make one run of these settings."""
    check_one_teacher(caches)
    check_one_quantization(caches)
    settings.check_names(list(caches))
    check_stages(settings, caches, ranks)


def check_stages(settings: TrainSettings, caches: Mapping[str, Cache], ranks: int) -> None:
    """Raise SettingsError, naming flag or stage, for settings that do not fit `ranks` processes or these caches."""
    teacher = next(iter(caches.values())).manifest.teacher
    settings.check_depth(family_named(teacher.family).anatomy.block_count(teacher.backbone_config))
    for stage in settings.stages:
        _check_divides(stage, ranks)
        _check_kinds(stage, {name: caches[name] for name in stage.caches or caches})
        for name in stage.caches or caches:
            if not caches[name].manifest.is_text:
                _check_fits(stage, caches[name])
    _check_used(settings, caches)
    if settings.teacher_use == "transformer" and settings.backbone_dtype == "cache":
        _check_one_dtype(caches)


def check_loss_fn(settings: TrainSettings, loss_fn: LossFunction | None) -> None:
    """Raise SettingsError for a function of the user that has no stage, or options of the loss that it replaces."""
    if loss_fn is None:
        return
    name = function_name(loss_fn)
    predicting = [stage for stage in settings.stages if stage.predicts]
    if not predicting:
        raise SettingsError(
            f"loss_fn is {name}, but no stage has the vision loss, whose place it takes: use loss vision, with steps "
            f"above 0"
        )
    for stage in predicting:
        for option in ("huber_delta", "timestep_weighting"):
            if (value := getattr(stage, option)) != Stage.model_fields[option].default:
                raise SettingsError(
                    f"{option} is {value} with loss_fn {name}, which computes the whole loss: remove it, and compute "
                    f"it in the function"
                )


def _check_kinds(stage: Stage, caches: Mapping[str, Cache]) -> None:
    """Raise an error unless the caches of a stage are of the kinds that it needs."""
    if not stage.replays:
        return
    text = [name for name, cache in caches.items() if cache.manifest.is_text]
    what = f"the {stage.loss} loss" if stage.name == MAIN else f"stage {stage.name} with the {stage.loss} loss"
    if len(text) == len(caches):
        caches[text[0]].require_trajectories(what)
    if stage.context_loss_weight and not text:
        raise SettingsError(
            f"{what} has context-loss-weight {stage.context_loss_weight:g}, but no text cache: the weight is for "
            f"prompts without trajectories; give a cache that was built with --text-only, or remove it"
        )


def _check_used(settings: TrainSettings, caches: Mapping[str, Cache]) -> None:
    """Raise SettingsError for a text cache that no stage reads."""
    for name, cache in caches.items():
        readers = (stage for stage in settings.stages if not stage.replays or stage.context_loss_weight)
        if cache.manifest.is_text and not any(stage.caches is None or name in stage.caches for stage in readers):
            raise SettingsError(
                f"cache {name} is a text cache, but no stage compares embeddings on it: give --pretrain-steps, a stage "
                f"with the context loss, or --context-loss-weight; or remove the cache"
            )


def _check_one_dtype(caches: Mapping[str, Cache]) -> None:
    (first_name, first), *others = ((name, cache) for name, cache in caches.items() if not cache.manifest.is_text)
    for name, other in others:
        if (was := first.manifest.sampling.dtype) != (now := other.manifest.sampling.dtype):
            raise SettingsError(
                f"cache {first_name} was recorded in {was} and {name} in {now}, but the transformer replays both in "
                f"one dtype: give --backbone-dtype {was} or {now}"
            )


def _check_divides(stage: Stage, ranks: int) -> None:
    unit = ranks * stage.grad_accum_steps * stage.timesteps_per_sample
    if stage.batch_size % unit:
        raise SettingsError(
            f"batch-size is {stage.batch_size} on {counted(ranks, 'process')}, expected a multiple of processes x "
            f"grad-accum-steps x timesteps-per-sample = {ranks} x {stage.grad_accum_steps} x "
            f"{stage.timesteps_per_sample}: each process computes an equal part of a batch; use "
            f"{max(1, stage.batch_size // unit) * unit}, or another number of processes"
        )


def _check_fits(stage: Stage, cache: Cache) -> None:
    steps = cache.manifest.sampling.steps
    if stage.timesteps_per_sample > steps:
        raise SettingsError(
            f"--timesteps-per-sample is {stage.timesteps_per_sample}, but the trajectories of {cache.folder} have "
            f"{counted(steps, 'step')}: give at most {steps}"
        )
    if cache.manifest.keeps_embeddings or not stage.needs_embeddings:
        return
    if stage.name != MAIN and stage.predicts:
        setting, fix = (
            f"stage {stage.name} has embedding-loss-weight {stage.embedding_loss_weight:g}",
            "remove it from the stage",
        )
    elif stage.name != MAIN:
        setting, fix = f"stage {stage.name} has the loss {stage.loss}", "use only stages with the vision loss"
    elif not stage.predicts:
        setting, fix = f"--loss is {stage.loss}", "give --loss vision"
    else:
        setting, fix = (
            f"--embedding-loss-weight is {stage.embedding_loss_weight:g}",
            "give --embedding-loss-weight 0",
        )
    raise SettingsError(
        f"{setting}, but {cache.folder} was built with --no-store-embeddings and has no embeddings to compare with: "
        f"{fix}, or build with --store-embeddings"
    )


def check_backend(settings: TrainSettings, teacher: TeacherFolder, dtype: torch.dtype, device: torch.device) -> None:
    """Raise SettingsError, before weights are read, unless the attention backend and the compiler work here."""
    check_attention(settings.attention_backend, teacher, dtype=dtype, device=device)
    if settings.deterministic and recorded_attention(settings.attention_backend) != RECORDED_NATIVE:
        raise SettingsError(
            f"--deterministic with the attention backend {recorded_attention(settings.attention_backend)}, expected "
            f"{NATIVE}: only of torch's own attention the deterministic kernels are known; remove one of them"
        )
    if settings.compile:
        check_compiler(device)


def how_replayed(settings: TrainSettings) -> str:
    """How the transformer is replayed, such as "transformer with attention sdpa, compiled"."""
    compiled = ", compiled" if settings.compile else ""
    return f"transformer with attention {recorded_attention(settings.attention_backend)}{compiled}"


def attention_notes(settings: TrainSettings, training_caches: Sequence[TrainingCache]) -> Iterator[str]:
    """Notes about an attention backend that differs from the recorded one, and about the time of compilation."""
    now = recorded_attention(settings.attention_backend)
    for training_cache in training_caches:
        was = _recorded(training_cache.cache)
        if was - {now}:
            yield (
                f"{training_cache.cache.folder} was recorded with attention {', '.join(sorted(was))}, this run uses "
                f"{now}: the replay error includes the difference in rounding"
            )
    if settings.compile:
        yield "the transformer's blocks are compiled at the first batch of each shape, which takes about a minute"


def _recorded(cache: Cache) -> set[str]:
    """The attention backends of the newest shard, taken as those of the whole cache."""
    newest = max((shard for kind, shard in cache.records if kind == "trajectories"), default=None)
    if newest is None:
        return set()
    ways = ways_made(cache.records["trajectories", newest].provenance)
    return {str(way.get("attention", RECORDED_NATIVE)) for way in ways}
