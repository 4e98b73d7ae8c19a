"""Writing a checkpoint, atomically: safetensors and JSON."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from secondcast.models.student.folder import CHECKPOINT_PREFIX, STATE_FILE, checkpoint_name, is_of_run, run_id
from secondcast.models.student.student import Student, save_student
from secondcast.storage_schemas.errors import RunError, reason
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import digest
from secondcast.trainer.run.checkpoints.reading import OPTIMIZER_FILE, TRAINED_FILE, checksums
from secondcast.trainer.run.train_state import TrainState

# Folders that are being written or deleted.
_TEMPORARY = re.compile(rf"\.{CHECKPOINT_PREFIX}\d{{8,}}\.\d+\.tmp")


def save_checkpoint(
    run: Path,
    step: int,
    train_state: TrainState,
    tokenizer: dict[str, bytes],
    state: dict[str, Any],
    say: Callable[[str], None],
) -> Path:
    """Atomically write RUN/checkpoint-<step> after `step` steps. All processes call it, the first one writes.

    An entry of that name that is not a checkpoint of the run is renamed and reported with `say`.

    state: what state.json holds beside the step.

    Raises RunError if the checkpoint cannot be written.
    """
    tensors = {OPTIMIZER_FILE: train_state.full_optimizer_tensors()}
    if train_state.average is not None:
        tensors[TRAINED_FILE] = train_state.full_trained_tensors()
    student = train_state.full_eval_student()
    final, state = run / checkpoint_name(step), {"step": step, **state}
    train_state.processes.broadcast_from_rank0(lambda: _write(final, student, tokenizer, tensors, state, say))
    return final


def _write(
    final: Path,
    student: Student,
    tokenizer: dict[str, bytes],
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_student(student, temporary / "student", tokenizer=tokenizer)
        for name, named in tensors.items():
            save_file(named, temporary / name)
            (temporary / name).chmod(durable.usual_mode(temporary))
        state = {**state, "run": run_id(final.parent), "files": checksums(temporary)}
        (temporary / STATE_FILE).write_text(json.dumps({**state, "digest": digest(state)}, indent=1) + "\n")
        for file in temporary.rglob("*"):
            durable.sync(file)
        if os.path.lexists(final):
            _make_way(final, say)
        temporary.rename(final)
        durable.sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"{final} cannot be written ({reason(error)}): earlier checkpoints are intact; free disk space (or fix "
            "the cause) and run the same command again to resume from the last of them"
        ) from error


def _make_way(final: Path, say: Callable[[str], None]) -> None:
    """Delete a checkpoint that is written again; rename anything else, or an unreadable one, to a free name."""
    if is_of_run(final):
        delete_checkpoint(final)
        return
    free = next(name for n in range(1, 10**6) if not os.path.lexists(name := final.with_name(f"{final.name}-kept-{n}")))
    final.rename(free)
    say(f"{final} is not a readable checkpoint of this run: renamed to {free.name}")


def delete_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint; a kill leaves it intact, or none."""
    # Rename first.
    gone = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}0.tmp")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def sweep(run: Path) -> None:
    """Delete partial checkpoints of a process that was killed while it wrote or deleted them."""
    for leftover in run.iterdir():
        if _TEMPORARY.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
