"""Phase 2: caches -> replay through the frozen backbone -> student -> checkpoints."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from secondcast.models.backbone import FluxBackbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.recorded_backbone import load_recorded_backbone
from secondcast.models.schedule import DTYPES
from secondcast.models.student.student import Student, new_student
from secondcast.models.student.tokens import StudentTokens, own_tokens, text_length_remark
from secondcast.models.teacher.context_projection import ContextProjection, load_context_projection
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.models.teacher.hub import split_revision
from secondcast.storage_schemas.errors import RunError, SettingsError
from secondcast.storage_schemas.progress import Progress, Silent, counted, duration_text
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.checks import check_backend, check_stages, how_replayed, remarks
from secondcast.trainer.cost.budget import measured_seconds, shared_out
from secondcast.trainer.cost.summary import summarized
from secondcast.trainer.data.mixture import TrainingCache, check_names, check_one_quantization, check_one_teacher
from secondcast.trainer.distributed.processes import ALONE, Distributed
from secondcast.trainer.loop import Trainer
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.losses.validation import bias_text, check_replay_error, replay_error_text
from secondcast.trainer.run.folder import FREE, create_run, find_run, held
from secondcast.trainer.run.metric_mirrors import MirrorName
from secondcast.trainer.run.metrics import Metrics
from secondcast.trainer.settings import RecordedWith, RunConfig, TrainedOn, TrainSettings
from secondcast.trainer.training_set import TrainingSet


def train(
    run: Path,
    settings: TrainSettings,
    caches: Mapping[str, Cache],
    teacher: TeacherFolder | ContextProjection | None,
    device: torch.device,
    progress: Progress,
    *,
    student_source: str,
    ignore_replay_error: bool,
    processes: Distributed = ALONE,
    report_to: Sequence[MirrorName] = (),
) -> int:
    """Train a student, or go on with one; how many optimizer steps it has then been trained for.

    caches: by the names that stages give them; the tokenizer of one goes with the student. teacher: where the
    transformer lies, or its text projection (None where settings.teacher_use is "none"). student_source: where
    settings.student lies. processes: all call it with the same arguments but for the device; the first one writes and
    speaks. report_to: where metrics are shown besides RUN/metrics.jsonl.
    """
    progress = progress if processes.is_first else Silent()
    metrics = Metrics(run, mirrors=report_to, say=progress.say) if processes.is_first else None
    # Positions count the trajectories of one cache behind those of another: the flags may come in any order.
    caches = dict(sorted(caches.items()))
    check_one_teacher(caches)
    check_one_quantization(caches)
    check_names(settings, list(caches))
    check_stages(settings, caches, processes.ranks)
    recorded = next(iter(caches.values())).manifest.teacher
    student = new_student(student_source, recorded, init=settings.init, dropout=settings.dropout, seed=settings.seed)
    wanted = _run_config(settings, caches, teacher)
    tokens = _own_tokens(settings, student_source, student)
    begun = _begun(run, wanted, processes)
    training_caches = [
        TrainingCache(name=name, cache=cache, training_set=(begun or wanted).caches[name].training_set)
        for name, cache in caches.items()
    ]
    for training_cache in training_caches:
        training_cache.training_set.check(training_cache.cache, run)
    objective = _objective(settings, training_caches, teacher, device, ranks=processes.ranks)
    for line in remarks(settings, training_caches) if objective.backbones else ():
        progress.say(line)
    make = partial(
        _trainer,
        training_caches=training_caches,
        objective=objective,
        student=student,
        device=device,
        tokens=tokens,
        processes=processes,
    )
    with ExitStack() as stack:
        # Before anything is written: config.json may be that of another process that trains.
        processes.broadcast_from_rank0(lambda: stack.enter_context(held(run)))
        if begun is None:
            _check_not_begun(run, wanted, processes)
            settings = _with_steps(settings, make, progress)
            config = wanted.model_copy(update={"settings": settings})
            processes.broadcast_from_rank0(lambda: create_run(run, config))
        else:
            settings = begun.settings.model_copy(update={name: getattr(settings, name) for name in FREE})
        trainer = make(run, settings, metrics=stack.enter_context(metrics) if metrics is not None else None)
        trainer.resume(progress)
        _say_what_is_trained(trainer, training_caches, progress)
        if remark := text_length_remark(student, recorded):
            progress.say(remark)
        if trainer.done == settings.total_steps:
            progress.say(f"{counted(trainer.done, 'step')} done before: nothing is left to do")
        else:
            _measure_replay_error(trainer, training_caches, progress, ignore_replay_error=ignore_replay_error)
        with summarized(trainer, training_caches, metrics, progress):
            best = trainer.train(progress)
        if best is not None:
            progress.say(f"lowest validation loss {best:.4g}, of the checkpoint named in best.json")
    return settings.total_steps


def _trainer(
    run: Path,
    settings: TrainSettings,
    *,
    training_caches: list[TrainingCache],
    objective: Objective,
    student: Student,
    device: torch.device,
    tokens: StudentTokens | None,
    processes: Distributed,
    metrics: Metrics | None = None,
) -> Trainer:
    autocast = _autocast(settings, training_caches[0].cache.manifest, device)
    objective = replace(objective, settings=settings)
    return Trainer(
        run,
        settings,
        training_caches,
        objective,
        student,
        device,
        autocast=autocast,
        tokens=tokens,
        processes=processes,
        metrics=metrics,
    )


def _own_tokens(settings: TrainSettings, source: str, student: Student) -> StudentTokens | None:
    tokens = own_tokens(source, student)
    if tokens is not None and (stage := next((stage for stage in settings.stages if stage.needs_embeddings), None)):
        what = (
            f"loss is {stage.loss}"
            if not stage.replays
            else f"embedding-loss-weight is {stage.embedding_loss_weight:g}"
        )
        raise SettingsError(
            f"{what}, but {source} reads prompts with its own tokenizer: its embeddings are not those of T5-XXL's "
            f"tokens, position by position; start with --loss vision, which does not compare them"
        )
    return tokens


def _with_steps(settings: TrainSettings, make: "partial[Trainer]", progress: Progress) -> TrainSettings:
    """The settings with steps in place of shares of a budget."""
    if settings.time_budget_seconds is None:
        return settings
    # The steps that are timed move a copy.
    student = make.keywords["student"]
    seconds = measured_seconds(settings, lambda run, probe: make(run, probe, student=copy.deepcopy(student)))
    # All agree on the slowest: they wait for each other in every step.
    seconds = make.keywords["processes"].largest(seconds)
    settings = shared_out(settings, seconds)
    left = iter(seconds)
    for stage in settings.stages:
        if stage.budget_share is not None:
            each = next(left)
            progress.say(
                f"stage {stage.name}: {counted(stage.length, 'step')} of {each:.3g} s as measured here, "
                f"{duration_text(stage.length * each)}"
            )
    return settings


def _say_what_is_trained(trainer: Trainer, training_caches: list[TrainingCache], progress: Progress) -> None:
    for training_cache in training_caches:
        cache, began = training_cache.cache, len(training_cache.training_set.indices())
        if not cache.finished:
            progress.say(f"{cache.folder} is not finished: {len(cache)} of its {cache.planned} trajectories are there")
        if began != len(cache):
            progress.say(
                f"{trainer.run} goes on with the {counted(began, 'trajectory')} with which it began, of {len(cache)} "
                f"that {cache.folder} has now: a new run folder takes all of them"
            )
    if (on_host := trainer.objective.host_modulation) is not None:
        progress.say(
            f"modulation vectors are computed on the host, a batch ahead, with {on_host.weights_bytes / 1e9:.3g} GB of "
            f"weights in its memory: it rounds otherwise than a GPU, which the replay error measures; --modulation "
            f"live keeps them on the GPU"
        )
    elif trainer.settings.modulation == "auto" and any(
        backbone.table is None for backbone in trainer.objective.backbones
    ):
        clip = any(training_cache.cache.manifest.teacher.pooled == "clip" for training_cache in training_caches)
        why = "the pooled vectors of CLIP are part of them" if clip else "a table of these caches would be larger"
        progress.say(f"no modulation table: {why}; the weights that it would stand for stay in memory")
    parameters = sum(parameter.numel() for parameter in trainer.student.parameters())
    autocast = ", bfloat16 autocast" if trainer.autocast else ""
    several = f" of {len(training_caches)} caches" if len(training_caches) > 1 else ""
    replayed = f"; {how_replayed(trainer.settings)}" if trainer.objective.backbones else ""
    progress.say(
        f"student of {parameters:,} parameters in float32{autocast}; "
        f"{counted(len(trainer.feed), 'trajectory')}{several} to train on, {len(trainer.held_out)} held out{replayed}"
    )


def _begun(run: Path, wanted: RunConfig, processes: Distributed) -> RunConfig | None:
    # The others would look while the first one makes the folder.
    def look() -> str | None:
        found = find_run(run, wanted)
        return None if found is None else found.model_dump_json()

    found = processes.broadcast_from_rank0(look)
    return None if found is None else RunConfig.model_validate_json(found)


def _check_not_begun(run: Path, wanted: RunConfig, processes: Distributed) -> None:
    if _begun(run, wanted, processes) is not None:
        raise RunError(
            f"another process began to train in {run} meanwhile: give the same command again to go on with it"
        )


def _objective(
    settings: TrainSettings,
    training_caches: list[TrainingCache],
    teacher: TeacherFolder | ContextProjection | None,
    device: torch.device,
    *,
    ranks: int = 1,
) -> Objective:
    manifests = [training_cache.cache.manifest for training_cache in training_caches]
    context_ID, backbones = None, []
    if isinstance(teacher, ContextProjection):
        context_ID = teacher.context_ID.to(device)
    elif teacher is not None and settings.projects:
        context_ID = load_context_projection(teacher, manifests[0].teacher, device)
    if isinstance(teacher, TeacherFolder) and settings.teacher_use == "transformer":
        loaded = _load_backbone(settings, manifests, teacher, device, ranks)
        backbones = [loaded.at(recorded_geometry(manifest.sampling)) for manifest in manifests]
    sigmas = [manifest.sampling.sigmas for manifest in manifests]
    return Objective(settings=settings, backbones=backbones, context_ID=context_ID, sigmas=sigmas)


def _autocast(settings: TrainSettings, manifest: Manifest, device: torch.device) -> bool:
    if settings.student_dtype == "auto":
        return device.type == "cuda" and _backbone_dtype(settings, manifest) == "bfloat16"
    return settings.student_dtype == "bfloat16-autocast"


def _backbone_dtype(settings: TrainSettings, manifest: Manifest) -> str:
    return manifest.sampling.dtype if settings.backbone_dtype == "cache" else settings.backbone_dtype


def _measure_replay_error(
    trainer: Trainer, training_caches: list[TrainingCache], progress: Progress, *, ignore_replay_error: bool
) -> None:
    if not trainer.objective.backbones or not trainer.settings.replay_check:
        return
    stored = [
        training_cache.cache.manifest.sampling.storage.embeddings == "stored" for training_cache in training_caches
    ]
    for training_cache in (
        training_cache for training_cache, has_one in zip(training_caches, stored, strict=True) if not has_one
    ):
        progress.say(
            f"no replay error: {training_cache.cache.folder} was built with --no-store-embeddings; "
            f"a cache with --store-embeddings has one"
        )
    if not any(stored):
        return
    replay_error = trainer.measure_replay_error([number for number, has_one in enumerate(stored) if has_one])
    recorded, here = training_caches[0].cache.manifest.sampling.quantize, trainer.settings.quantize
    progress.say(replay_error_text(replay_error, recorded, here))
    if not ignore_replay_error:
        check_replay_error(replay_error, recorded, here)
    if remark := bias_text(replay_error, recorded, here):
        progress.say(remark)


def _run_config(
    settings: TrainSettings, caches: Mapping[str, Cache], teacher: TeacherFolder | ContextProjection | None
) -> RunConfig:
    manifests = [cache.manifest for cache in caches.values()]
    guidance = {value for manifest in manifests for value in manifest.sampling.guidance or ()}
    first = manifests[0]
    return RunConfig(
        settings=settings,
        caches={
            name: TrainedOn(
                location=cache.location,
                sampling_digest=cache.manifest.digests()["sampling"],
                training_set=TrainingSet.of(cache),
            )
            for name, cache in caches.items()
        },
        backbone=teacher.source if teacher is not None else split_revision(first.source)[0],
        teacher_digest=first.digests()["teacher"],
        text_length=first.teacher.text_length,
        text_width=first.teacher.text_width,
        guidance=tuple(sorted(guidance)) or None,
        recorded=RecordedWith.of(first),
    )


def _load_backbone(
    settings: TrainSettings, manifests: Sequence[Manifest], teacher: TeacherFolder, device: torch.device, ranks: int
) -> FluxBackbone:
    dtype = DTYPES[_backbone_dtype(settings, manifests[0])]
    check_backend(settings, teacher, dtype, device)
    return load_recorded_backbone(
        manifests,
        teacher,
        dtype=dtype,
        batch_rows=max(1, settings.replay_rows // ranks),
        options=settings.memory,
        attention_backend=settings.attention_backend,
        device=device,
    )
