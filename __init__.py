"""Distill the text encoder of a text-to-image model into a small one: record the teacher, train from the recording."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secondcast.api.building import build as build
    from secondcast.api.caches import open_cache as open_cache
    from secondcast.api.pictures import film_strips as film_strips
    from secondcast.api.students import load_student as load_student
    from secondcast.api.training import TrainedRun as TrainedRun
    from secondcast.api.training import train as train
    from secondcast.models.student.prompt_encoder import PromptEncoder as PromptEncoder
    from secondcast.storage_schemas.errors import SecondcastError as SecondcastError
    from secondcast.storage_schemas.reader import Cache as Cache
    from secondcast.storage_schemas.tensors import to_torch as to_torch
    from secondcast.storage_schemas.trajectories import RecordedTrajectory as RecordedTrajectory
    from secondcast.trainer.data.replay_dataset import Batch as Batch
    from secondcast.trainer.loop import Observer as Observer
    from secondcast.trainer.loop import Trainer as Trainer

__version__ = "0.2.0"
_EXPORTS = {
    "Batch": "trainer.data.replay_dataset",
    "Cache": "storage_schemas.reader",
    "Observer": "trainer.loop",
    "PromptEncoder": "models.student.prompt_encoder",
    "RecordedTrajectory": "storage_schemas.trajectories",
    "SecondcastError": "storage_schemas.errors",
    "TrainedRun": "api.training",
    "Trainer": "trainer.loop",
    "build": "api.building",
    "film_strips": "api.pictures",
    "load_student": "api.students",
    "open_cache": "api.caches",
    "to_torch": "storage_schemas.tensors",
    "train": "api.training",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    """Import an export when it is first used, so that `import secondcast` loads no library."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"secondcast.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'secondcast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
