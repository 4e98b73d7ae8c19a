"""The best checkpoint of a run: best.json, and which checkpoints are kept beside it."""

import json
from collections.abc import Callable
from pathlib import Path

from secondcast.models.student.folder import BEST_FILE, best_checkpoint, checkpoints, is_of_run, stated, step_of
from secondcast.storage_schemas.errors import StudentError
from secondcast.storage_schemas.io import durable
from secondcast.trainer.run.checkpoints.saving import delete_checkpoint


def mark_best(run: Path, folder: Path, loss: float) -> None:
    """Record the checkpoint with the lowest validation loss."""
    durable.replace(run / BEST_FILE, (json.dumps({"checkpoint": folder.name, "loss": loss}) + "\n").encode())


def validation_text(folder: Path, loss: float, lowest: float, keep: int) -> str:
    """A line about the validation of a new checkpoint: its loss, the lowest so far, and whether it is kept.

    keep: number of latest checkpoints that are kept.
    """
    try:
        best = best_checkpoint(folder.parent)
    except StudentError:
        # The run trains on without it: see delete_old_checkpoints.
        best = None
    measured = f"step {step_of(folder)}: validation loss {loss:.4g}"
    if best is not None and best[0] == folder:
        return f"{measured}, the lowest so far; {folder.name} is kept as the best"
    step = f" at step {step_of(best[0])}" if best is not None else ""
    kept = "until the next" if keep == 1 else f"among the last {keep}"
    return f"{measured}, the lowest is {lowest:.4g}{step}; {folder.name} is kept {kept}"


def restore_best(newest: Path, say: Callable[[str], None]) -> None:
    """Restore best.json from the states of the checkpoints up to the newest, after a kill or damage."""
    try:
        noted = best_checkpoint(newest.parent)
    except StudentError as error:
        noted = None
        say(f"{error}; no checkpoint is deleted until there is a new best one")
    for folder in reversed(_up_to(newest)):
        state = stated(folder)
        if state is not None and state.get("is_best"):
            if noted is None or noted[0] != folder:
                mark_best(newest.parent, folder, state["best"])
            return


def delete_old_checkpoints(newest: Path, keep: int) -> None:
    """Delete the checkpoints of a run up to the newest, except the last `keep` and the best."""
    try:
        best = best_checkpoint(newest.parent)
    except StudentError:
        # Any checkpoint may be the best.
        return
    # Later checkpoints were unreadable when the run resumed: they are written again, and do not count.
    for folder in _up_to(newest)[:-keep]:
        if is_of_run(folder) and (best is None or folder != best[0]):
            delete_checkpoint(folder)


def _up_to(newest: Path) -> list[Path]:
    return [folder for folder in checkpoints(newest.parent) if (step_of(folder) or 0) <= (step_of(newest) or 0)]
