"""Phase 2: cache -> replay through the frozen backbone -> student -> checkpoints."""

from pathlib import Path

import torch

from models.backbone import FluxBackbone
from models.context_projection import load_context_projection
from models.geometry import recorded_geometry
from models.schedule import DTYPES
from models.student import new_student
from models.teacher_folder import TeacherFolder
from models.teacher_hub import split_revision
from storage_schemas.errors import BadSettings, BadTeacher
from storage_schemas.manifest import Manifest
from storage_schemas.progress import Progress
from storage_schemas.reader import Cache
from trainer.loop import Trainer
from trainer.losses import Objective, step_weights
from trainer.run_folder import log_metrics, open_run
from trainer.settings import RunConfig, TrainSettings
from trainer.training_set import TrainingSet

# Law 3: above this part of the velocity's norm, the replay of the teacher's own embedding means a wrong backbone.
LARGEST_FLOOR = 0.03


def train(
    run: Path,
    settings: TrainSettings,
    cache: Cache,
    teacher: TeacherFolder | None,
    device: torch.device,
    progress: Progress,
    *,
    student_source: str,
    accept_floor: bool,
) -> Path:
    """Train a student, or go on with one.

    teacher: where the transformer lies (None where settings.teacher_use is "none"). student_source: where
    settings.student lies.
    """
    _check_fits(settings, cache)
    student = new_student(
        student_source, cache.manifest.teacher, init=settings.init, dropout=settings.dropout, seed=settings.seed
    )
    training_set = open_run(run, _run_config(settings, cache, teacher), TrainingSet.of(cache))
    training_set.check(cache, run)
    objective = _objective(settings, cache.manifest, teacher, device)
    autocast = _autocast(settings, cache.manifest, device)
    trainer = Trainer(run, settings, cache, objective, student, device, training_set, autocast=autocast)
    parameters = sum(parameter.numel() for parameter in trainer.student.parameters())
    if not cache.finished:
        progress.say(f"{cache.folder} is not finished: {len(cache)} of its {cache.planned} trajectories are there")
    if (began := len(training_set.indices())) != len(cache):
        progress.say(
            f"{run} goes on with the {began} trajectories with which it began, of {len(cache)} that {cache.folder} "
            f"has now: a new run folder takes all of them"
        )
    progress.say(
        f"student of {parameters:,} parameters in float32{', bfloat16 autocast' * autocast}; {len(trainer.feed)} "
        f"trajectories to train on, {len(trainer.held_out)} held out"
    )
    if cache.manifest.sampling.storage.embeddings == "none":
        progress.say(
            f"no replay floor: {cache.folder} was built with --embeddings none; "
            f"a cache with --embeddings stored has one"
        )
    elif objective.backbone is not None:
        _check_floor(trainer, progress, accept_floor=accept_floor)
    trainer.train(progress)
    return run


def _check_fits(settings: TrainSettings, cache: Cache) -> None:
    steps = cache.manifest.sampling.steps
    if settings.steps_per_trajectory > steps:
        raise BadSettings(
            f"--steps-per-trajectory is {settings.steps_per_trajectory}, the trajectories of {cache.folder} have "
            f"{steps} steps: as many different ones there are not; give at most {steps}"
        )
    if cache.manifest.sampling.storage.embeddings == "stored" or not settings.needs_embeddings:
        return
    if settings.warmup_steps:
        asked, what, way = f"--warmup-steps is {settings.warmup_steps}", "the warm-up", "--warmup-steps 0"
    elif settings.loss != "vision":
        asked, what, way = f"--loss is {settings.loss}", "this loss", "--loss vision"
    else:
        asked, what, way = f"--embedding-term is {settings.embedding_term:g}", "the term", "--embedding-term 0"
    raise BadSettings(
        f"{asked}, but {cache.folder} was built with --embeddings none: {what} compares with the teacher's "
        f"embeddings; give {way}, or build with --embeddings stored"
    )


def _objective(
    settings: TrainSettings, manifest: Manifest, teacher: TeacherFolder | None, device: torch.device
) -> Objective:
    backbone = context_ID = None
    if teacher is not None and "context" in settings.losses:
        context_ID = load_context_projection(teacher, manifest.teacher, device)
    if teacher is not None and settings.teacher_use == "transformer":
        backbone = _load_backbone(settings, manifest, teacher, device)
    weights_K = step_weights(settings.step_weights, manifest.sampling.sigmas)
    weights_K = weights_K.to(device) if weights_K is not None else None
    return Objective(settings=settings, backbone=backbone, context_ID=context_ID, weights_K=weights_K)


def _autocast(settings: TrainSettings, manifest: Manifest, device: torch.device) -> bool:
    if settings.student_dtype == "auto":
        return device.type == "cuda" and _backbone_dtype(settings, manifest) == "bfloat16"
    return settings.student_dtype == "bfloat16-autocast"


def _backbone_dtype(settings: TrainSettings, manifest: Manifest) -> str:
    return manifest.sampling.dtype if settings.backbone_dtype == "cache" else settings.backbone_dtype


def _check_floor(trainer: Trainer, progress: Progress, *, accept_floor: bool) -> None:
    error, relative = trainer.replay_floor()
    # Before step 0: no resume forgets it.
    log_metrics(trainer.run, step=-1, replay_floor=error)
    progress.say(
        f"replay floor {error:.3g} ({100 * relative:.2f} % of the velocity's norm): no student's loss can be lower"
    )
    if relative > LARGEST_FLOOR and not accept_floor:
        raise BadTeacher(
            f"the cached embeddings replay with an error of {100 * relative:.1f} % of the velocity's norm, expected at "
            f"most {100 * LARGEST_FLOOR:.0f} %: other weights, another dtype or a faulty device; check --backbone, or "
            f"give --accept-floor"
        )


def _run_config(settings: TrainSettings, cache: Cache, teacher: TeacherFolder | None) -> RunConfig:
    digests = cache.manifest.digests()
    return RunConfig(
        settings=settings,
        cache=cache.location,
        backbone=teacher.source if teacher is not None else split_revision(cache.manifest.source)[0],
        teacher_digest=digests["teacher"],
        sampling_digest=digests["sampling"],
        text_length=cache.manifest.teacher.text_length,
        text_width=cache.manifest.teacher.text_width,
        guidance=cache.manifest.sampling.guidance,
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
