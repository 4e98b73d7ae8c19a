"""Restoring a run from its newest intact checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from secondcast.models.student.folder import checkpoints, named_like_checkpoints
from secondcast.models.student.student import Student
from secondcast.models.weights.files import CheckpointSource, StoredTensor
from secondcast.models.weights.mismatch import compared
from secondcast.storage_schemas.errors import RunError
from secondcast.trainer.run.checkpoints.reading import DamagedCheckpointError, SavedCheckpoint, read_checkpoint
from secondcast.trainer.run.checkpoints.saving import sweep
from secondcast.trainer.run.train_state import TrainState


def load_checkpoint(
    run: Path, train_state: TrainState, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """Restore everything from the newest intact checkpoint; its folder and state, or None if there is none.

    The first process selects it, all processes read it.
    """
    averaged = train_state.average is not None
    saved: SavedCheckpoint | None = None

    def name_of_newest() -> str | None:
        nonlocal saved
        saved = _newest_intact(run, say, averaged=averaged)
        return saved.folder.name if saved is not None else None

    name = train_state.processes.broadcast_from_rank0(name_of_newest)
    if name is None:
        return None
    saved = saved or read_checkpoint(run / name, averaged=averaged)
    _check_same_student(saved, train_state.eval_student)
    train_state.restore(evaluated=saved.evaluated, trained=saved.trained, moments=saved.moments)
    return saved.folder, saved.state


def _newest_intact(run: Path, say: Callable[[str], None], *, averaged: bool) -> SavedCheckpoint | None:
    sweep(run)
    folders = checkpoints(run)
    for other in [path for path in named_like_checkpoints(run) if path not in folders]:
        say(f"{other} is not a checkpoint that this run wrote under this name: ignored")
    problems: list[DamagedCheckpointError] = []
    for folder in reversed(folders):
        try:
            saved = read_checkpoint(folder, averaged=averaged)
        except DamagedCheckpointError as error:
            problems.append(error)
            continue
        for problem in problems:
            say(f"{problem}: falling back to the previous checkpoint")
        return saved
    if problems:
        others = "" if len(problems) == 1 else f", and none of the {len(problems) - 1} before it"
        raise RunError(
            f"{problems[0]}{others}: a run does not restart over its checkpoints; restore one of them from a backup, "
            "or give a new run folder"
        )
    return None


def _check_same_student(saved: SavedCheckpoint, student: Student) -> None:
    held = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    tensors = {name: StoredTensor(shape=tuple(tensor.shape), dtype="F32") for name, tensor in saved.evaluated.items()}
    if mismatch := compared("the student to be trained", held, tensors):
        source = CheckpointSource(where=str(saved.folder), error=RunError, again="")
        raise mismatch.error(source, fix="give the --student of the run, or a new run folder")
