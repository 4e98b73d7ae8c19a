"""Several caches of one teacher for tests, and trainers on them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secondcast.models.student.student import new_student
from secondcast.models.teacher.folder import REPLAY_PARTS, find_teacher
from secondcast.storage_schemas.progress import Progress, Silent
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.prompts import is_held_out, prompt_id
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.loop import Trainer
from secondcast.trainer.preparing.loading import load_objective
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage
from secondcast.trainer.train import train
from secondcast.trainer.training_set import TrainingSet
from tests.cache_builder.building import build_cache

CPU = torch.device("cpu")


def texts_of(word: str, count: int) -> list[str]:
    """Prompts that are trained on, and one that is held out, last."""
    all_of_them = [f"a red {word} {number}" for number in range(400)]
    held_out = next(text for text in all_of_them if is_held_out(prompt_id(text)))
    return [*[text for text in all_of_them if not is_held_out(prompt_id(text))][:count], held_out]


def small_cache(folder: Path, teacher: Path, texts: list[str], **flags: Any) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    prompts = folder.with_suffix(".txt")
    prompts.write_text("".join(f"{text}\n" for text in texts))
    build_cache(folder, teacher, prompts, **{"shard_size": 4, "batch_size": 8, **flags})
    return folder


def run_settings(*stages: Stage | dict[str, Any], **run: Any) -> TrainSettings:
    usual = {"steps": 4, "batch_size": 4, "learning_rate": 1e-3}
    made = [
        stage if isinstance(stage, Stage) else Stage(**{"name": str(number), **usual} | stage)
        for number, stage in enumerate(stages)
    ]
    return TrainSettings(**{"student": "s", "stages": tuple(made), "dropout": 0.2, "checkpoint_every": 2} | run)


def mixed_trainer(
    run: Path, settings: TrainSettings, places: Mapping[str, Path], teacher: Path, student: Path
) -> Trainer:
    """A trainer as `train` makes it, with all in reach."""
    run.mkdir(parents=True, exist_ok=True)
    caches = {name: Cache.open(place) for name, place in places.items()}
    training_caches = [
        TrainingCache(name=name, cache=cache, training_set=TrainingSet.of(cache)) for name, cache in caches.items()
    ]
    objective = load_objective(settings, training_caches, find_teacher(str(teacher), REPLAY_PARTS), CPU)
    recorded = training_caches[0].cache.manifest.teacher
    made = new_student(str(student), recorded, init="auto", dropout=settings.dropout, seed=0)
    return Trainer(run, settings, training_caches, objective, made, CPU, autocast=False)


def train_mixed(
    run: Path,
    settings: TrainSettings,
    places: Mapping[str, Path],
    teacher: Path,
    student: Path,
    progress: Progress | None = None,
) -> Path:
    caches = {name: Cache.open(place) for name, place in places.items()}
    folder = find_teacher(str(teacher), REPLAY_PARTS)
    train(
        run, settings, caches, folder, CPU, progress or Silent(), student_source=str(student), ignore_replay_error=False
    )  # fmt: skip
    return run
