"""Trainers for tests, made as `secondcast train` makes them, with all in reach."""

from dataclasses import replace
from pathlib import Path

import torch

from secondcast.models.student.student import new_student
from secondcast.models.student.tokens import own_tokens
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.distributed.processes import SINGLE_PROCESS
from secondcast.trainer.loop import Trainer
from secondcast.trainer.preparing.loading import load_objective, uses_autocast
from secondcast.trainer.preparing.stream_variances import stream_variances
from secondcast.trainer.settings import TrainFlags
from secondcast.trainer.training_set import TrainingSet

CPU = torch.device("cpu")


def make_trainer(run: Path, cache_folder: Path, teacher: Path, student: Path, **flags) -> Trainer:
    flags = {"steps": 8, "batch_size": 8, "learning_rate": 1e-3, "dropout": 0.0, **flags}
    settings = TrainFlags.from_flags(student=str(student), **flags).settings()
    cache = Cache.open(cache_folder)
    run.mkdir(parents=True, exist_ok=True)
    training_caches = [TrainingCache(name="cache", cache=cache, training_set=TrainingSet.of(cache))]
    objective = load_objective(settings, training_caches, find_teacher(str(teacher), REPLAY_PARTS), CPU)
    variances = stream_variances(objective, training_caches, None, CPU, SINGLE_PROCESS, Silent())
    objective = replace(objective, stream_variances={one.blocks: one for one in variances})
    made = new_student(str(student), cache.manifest.teacher, init="auto", dropout=settings.dropout, seed=0)
    autocast = uses_autocast(settings, cache.manifest, CPU)
    tokens = own_tokens(str(student), made)
    return Trainer(run, settings, training_caches, objective, made, CPU, autocast=autocast, tokens=tokens)


def gradient(trainer: Trainer, step: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step, no step taken."""
    trainer.student.train().zero_grad()
    at = trainer.settings.at(step)
    parts = at.stage.grad_accum_steps
    with trainer.dataset.prefetch(trainer.plan.requests(step)) as batches:
        loss = sum(float(trainer._gradients(at, part, next(batches))) for part in range(parts)) / parts
    return loss, {name: value.grad.clone() for name, value in trainer.student.named_parameters()}
