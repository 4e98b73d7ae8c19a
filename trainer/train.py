"""Phase 2: caches -> replay through the frozen backbone -> student -> checkpoints."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from models.backbone import FluxBackbone
from models.context_projection import ContextProjection, load_context_projection
from models.geometry import recorded_geometry
from models.schedule import DTYPES
from models.student import Student, new_student
from models.student_tokens import StudentTokens, own_tokens, text_length_remark
from models.teacher_folder import TeacherFolder
from models.teacher_hub import split_revision
from storage_schemas.errors import BadSettings, BadTeacher
from storage_schemas.manifest import Manifest
from storage_schemas.progress import Progress, Silent, duration_text
from storage_schemas.reader import Cache
from trainer.budget import measured_seconds, shared_out
from trainer.loop import Trainer
from trainer.losses import Objective
from trainer.metric_mirrors import MirrorName
from trainer.metrics import Metrics
from trainer.mixture import Lesson, check_names, check_one_teacher
from trainer.processes import ALONE, Processes
from trainer.run_folder import begin_run, begun_run, held
from trainer.settings import MAIN, RunConfig, TrainedOn, TrainSettings
from trainer.stage import Stage
from trainer.training_set import TrainingSet

# Law 3: above this part of the velocity's norm, the replay of the teacher's own embedding means a wrong backbone.
LARGEST_FLOOR = 0.03


def train(
    run: Path,
    settings: TrainSettings,
    caches: Mapping[str, Cache],
    teacher: TeacherFolder | ContextProjection | None,
    device: torch.device,
    progress: Progress,
    *,
    student_source: str,
    accept_floor: bool,
    processes: Processes = ALONE,
    log_to: Sequence[MirrorName] = (),
) -> int:
    """Train a student, or go on with one; how many optimizer steps it has then been trained for.

    caches: by the names that stages give them; the tokenizer of one goes with the student. teacher: where the
    transformer lies, or its text projection (None where settings.teacher_use is "none"). student_source: where
    settings.student lies. processes: all call it with the same arguments but for the device; the first one writes and
    speaks. log_to: where metrics are shown besides RUN/metrics.jsonl.
    """
    progress = progress if processes.is_first else Silent()
    metrics = Metrics(run, mirrors=log_to, say=progress.say) if processes.is_first else None
    # Positions count the trajectories of one cache behind those of another: the flags may come in any order.
    caches = dict(sorted(caches.items()))
    check_one_teacher(caches)
    check_names(settings, list(caches))
    for stage in settings.stages:
        _check_divides(stage, processes.ranks)
        for name in stage.caches or caches:
            _check_fits(stage, caches[name])
    recorded = next(iter(caches.values())).manifest.teacher
    student = new_student(student_source, recorded, init=settings.init, dropout=settings.dropout, seed=settings.seed)
    wanted = _run_config(settings, caches, teacher)
    tokens = _own_tokens(settings, student_source, student)
    begun = _begun(run, wanted, processes)
    lessons = [
        Lesson(name=name, cache=cache, training_set=(begun or wanted).caches[name].training_set)
        for name, cache in caches.items()
    ]
    for lesson in lessons:
        lesson.training_set.check(lesson.cache, run)
    objective = _objective(settings, lessons, teacher, device)
    make = partial(
        _trainer,
        lessons=lessons,
        objective=objective,
        student=student,
        device=device,
        tokens=tokens,
        processes=processes,
    )
    if begun is None:
        settings = _with_steps(settings, make, progress)
        config = wanted.model_copy(update={"settings": settings})
        processes.from_first(lambda: begin_run(run, config))
    else:
        settings = begun.settings.model_copy(update={"keep": settings.keep, "floor": settings.floor})
    with ExitStack() as stack:
        processes.from_first(lambda: stack.enter_context(held(run)))
        trainer = make(run, settings, metrics=stack.enter_context(metrics) if metrics is not None else None)
        trainer.resume(progress)
        _say_what_is_trained(trainer, lessons, progress)
        if remark := text_length_remark(student, recorded):
            progress.say(remark)
        _measure_floor(trainer, lessons, progress, accept_floor=accept_floor)
        best = trainer.train(progress)
        if best is not None:
            progress.say(f"lowest validation loss {best:.4g}, of the checkpoint named in best.json")
    return settings.total_steps


def _trainer(
    run: Path,
    settings: TrainSettings,
    *,
    lessons: list[Lesson],
    objective: Objective,
    student: Student,
    device: torch.device,
    tokens: StudentTokens | None,
    processes: Processes,
    metrics: Metrics | None = None,
) -> Trainer:
    autocast = _autocast(settings, lessons[0].cache.manifest, device)
    objective = replace(objective, settings=settings)
    return Trainer(
        run,
        settings,
        lessons,
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
        what = f"loss is {stage.loss}" if stage.loss != "vision" else f"embedding-term is {stage.embedding_term:g}"
        raise BadSettings(
            f"{what}, but {source} reads prompts with its own tokenizer: its embeddings are not those of T5-XXL's "
            f"tokens, position by position; start with --loss vision, which does not compare them"
        )
    return tokens


def _with_steps(settings: TrainSettings, make: "partial[Trainer]", progress: Progress) -> TrainSettings:
    """The settings with steps in place of shares of a budget."""
    if settings.budget_seconds is None:
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
                f"stage {stage.name}: {stage.length:,} steps of {each:.3g} s as measured here, "
                f"{duration_text(stage.length * each)}"
            )
    return settings


def _say_what_is_trained(trainer: Trainer, lessons: list[Lesson], progress: Progress) -> None:
    for lesson in lessons:
        cache, began = lesson.cache, len(lesson.training_set.indices())
        if not cache.finished:
            progress.say(f"{cache.folder} is not finished: {len(cache)} of its {cache.planned} trajectories are there")
        if began != len(cache):
            progress.say(
                f"{trainer.run} goes on with the {began} trajectories with which it began, of {len(cache)} that "
                f"{cache.folder} has now: a new run folder takes all of them"
            )
    parameters = sum(parameter.numel() for parameter in trainer.student.parameters())
    autocast = ", bfloat16 autocast" if trainer.autocast else ""
    several = f" of {len(lessons)} caches" if len(lessons) > 1 else ""
    progress.say(
        f"student of {parameters:,} parameters in float32{autocast}; {len(trainer.feed)} trajectories{several} to "
        f"train on, {len(trainer.held_out)} held out"
    )


def _begun(run: Path, wanted: RunConfig, processes: Processes) -> RunConfig | None:
    # The others would look while the first one makes the folder.
    def look() -> str | None:
        found = begun_run(run, wanted)
        return None if found is None else found.model_dump_json()

    found = processes.from_first(look)
    return None if found is None else RunConfig.model_validate_json(found)


def _check_divides(stage: Stage, ranks: int) -> None:
    unit = ranks * stage.accumulate * stage.steps_per_trajectory
    if stage.batch_size % unit:
        raise BadSettings(
            f"batch-size is {stage.batch_size} on {ranks} processes, expected a multiple of processes x accumulate x "
            f"steps-per-trajectory = {ranks} x {stage.accumulate} x {stage.steps_per_trajectory}: each computes an "
            f"equal part of a batch; take {max(1, stage.batch_size // unit) * unit}, or another number of processes"
        )


def _check_fits(stage: Stage, cache: Cache) -> None:
    steps = cache.manifest.sampling.steps
    if stage.steps_per_trajectory > steps:
        raise BadSettings(
            f"--steps-per-trajectory is {stage.steps_per_trajectory}, the trajectories of {cache.folder} have "
            f"{steps} steps: as many different ones there are not; give at most {steps}"
        )
    if cache.manifest.sampling.storage.embeddings == "stored" or not stage.needs_embeddings:
        return
    if stage.name != MAIN:
        asked, what, way = f"stage {stage.name} has the loss {stage.loss}", "it", "stages of --loss vision alone"
    elif stage.loss != "vision":
        asked, what, way = f"--loss is {stage.loss}", "this loss", "--loss vision"
    else:
        asked, what, way = f"--embedding-term is {stage.embedding_term:g}", "the term", "--embedding-term 0"
    raise BadSettings(
        f"{asked}, but {cache.folder} was built with --embeddings none: {what} compares with the teacher's "
        f"embeddings; give {way}, or build with --embeddings stored"
    )


def _objective(
    settings: TrainSettings,
    lessons: list[Lesson],
    teacher: TeacherFolder | ContextProjection | None,
    device: torch.device,
) -> Objective:
    manifests = [lesson.cache.manifest for lesson in lessons]
    context_ID, backbones = None, []
    if isinstance(teacher, ContextProjection):
        context_ID = teacher.context_ID.to(device)
    elif teacher is not None and "context" in settings.losses:
        context_ID = load_context_projection(teacher, manifests[0].teacher, device)
    if isinstance(teacher, TeacherFolder) and settings.teacher_use == "transformer":
        loaded = _load_backbone(settings, manifests[0], teacher, device)
        backbones = [loaded.at(recorded_geometry(manifest.sampling)) for manifest in manifests]
    sigmas = [manifest.sampling.sigmas for manifest in manifests]
    return Objective(settings=settings, backbones=backbones, context_ID=context_ID, sigmas=sigmas)


def _autocast(settings: TrainSettings, manifest: Manifest, device: torch.device) -> bool:
    if settings.student_dtype == "auto":
        return device.type == "cuda" and _backbone_dtype(settings, manifest) == "bfloat16"
    return settings.student_dtype == "bfloat16-autocast"


def _backbone_dtype(settings: TrainSettings, manifest: Manifest) -> str:
    return manifest.sampling.dtype if settings.backbone_dtype == "cache" else settings.backbone_dtype


def _measure_floor(trainer: Trainer, lessons: list[Lesson], progress: Progress, *, accept_floor: bool) -> None:
    for lesson in lessons:
        if lesson.cache.manifest.sampling.storage.embeddings == "none":
            progress.say(
                f"no replay floor: {lesson.cache.folder} was built with --embeddings none; "
                f"a cache with --embeddings stored has one"
            )
            return
    if not trainer.objective.backbones or not trainer.settings.floor:
        return
    floor = trainer.measure_floor()
    progress.say(
        f"replay floor {floor.error:.3g} ({100 * floor.relative:.2f} % of the velocity's norm): no student's loss can "
        f"be lower"
    )
    if floor.relative > LARGEST_FLOOR and not accept_floor:
        raise BadTeacher(
            f"the cached embeddings replay with an error of {100 * floor.relative:.1f} % of the velocity's norm, "
            f"expected at most {100 * LARGEST_FLOOR:.0f} %: other weights, another dtype or a faulty device; check "
            f"--backbone, or give --accept-floor"
        )


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
    )


def _load_backbone(
    settings: TrainSettings, manifest: Manifest, teacher: TeacherFolder, device: torch.device
) -> FluxBackbone:
    expected = {name: value for name, value in manifest.teacher.weights.items() if name.startswith("transformer/")}
    found = teacher.weight_hashes("transformer")
    if found != expected:
        name = next(name for name in sorted(expected | found) if expected.get(name) != found.get(name))
        raise BadTeacher(
            f"{teacher.path}/{name} has sha256 {str(found.get(name))[:16]}, the cache was recorded with "
            f"{str(expected.get(name))[:16]}: another model; give the recorded one with --backbone"
        )
    geometry = recorded_geometry(manifest.sampling)
    dtype = DTYPES[_backbone_dtype(settings, manifest)]
    return FluxBackbone.load(
        teacher.path, geometry, text_length=manifest.teacher.text_length, dtype=dtype, device=device
    )
