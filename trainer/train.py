"""Phase 2: cache -> replay through the frozen backbone -> student -> checkpoints."""

from pathlib import Path

import torch

from models.backbone import FluxBackbone
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

    teacher: where the transformer lies (None for a warm-up alone). student_source: where settings.student lies.
    """
    _check_warm_up(settings, cache)
    student = new_student(
        student_source, cache.manifest.teacher, init=settings.init, dropout=settings.dropout, seed=settings.seed
    )
    training_set = open_run(run, _run_config(settings, cache, teacher), TrainingSet.of(cache))
    training_set.check(cache, run)
    backbone = _load_backbone(settings, cache.manifest, teacher, device) if teacher is not None else None
    trainer = Trainer(run, settings, cache, backbone, student, device, training_set)
    parameters = sum(parameter.numel() for parameter in trainer.student.parameters())
    if not cache.finished:
        progress.say(f"{cache.folder} is not finished: {len(cache)} of its {cache.planned} trajectories are there")
    if (began := len(training_set.indices())) != len(cache):
        progress.say(
            f"{run} goes on with the {began} trajectories with which it began, of {len(cache)} that {cache.folder} "
            f"has now: a new run folder takes all of them"
        )
    progress.say(
        f"student of {parameters:,} parameters; {len(trainer.feed)} trajectories to train on, "
        f"{len(trainer.held_out)} held out"
    )
    if cache.manifest.sampling.storage.embeddings == "none":
        progress.say(
            f"no replay floor: {cache.folder} was built with --embeddings none; "
            f"a cache with --embeddings stored has one"
        )
    elif backbone is not None:
        _check_floor(trainer, progress, accept_floor=accept_floor)
    trainer.train(progress)
    return run


def _check_warm_up(settings: TrainSettings, cache: Cache) -> None:
    if settings.warmup_steps and cache.manifest.sampling.storage.embeddings == "none":
        raise BadSettings(
            f"--warmup-steps is {settings.warmup_steps}, but {cache.folder} was built with --embeddings none: the "
            f"warm-up compares with the teacher's embeddings; give --warmup-steps 0, or build with --embeddings stored"
        )


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
    sampling = manifest.sampling
    geometry = recorded_geometry(sampling)
    name = sampling.dtype if settings.backbone_dtype == "cache" else settings.backbone_dtype
    return FluxBackbone.load(
        teacher.path, geometry, text_length=manifest.teacher.text_length, dtype=DTYPES[name], device=device
    )
