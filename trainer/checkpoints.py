"""Checkpoints of a run: safetensors and JSON, written whole or not at all, the last one readable wins."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.student import BEST_FILE, CHECKPOINT_PREFIX, Student, checkpoints, load_student, save_student
from storage_schemas import durable
from storage_schemas.digests import xxh3_128_of_parts
from storage_schemas.errors import BadRun, BadStudent

STATE_FILE = "state.json"
_CHUNK_BYTES = 2**24
_OPTIMIZER_FILE = "optimizer.safetensors"
# The parameters that go on training; where there is no average, they are those of student/.
_TRAINED_FILE = "trained.safetensors"


def save_checkpoint(
    run: Path,
    step: int,
    student: Student,
    optimizer: torch.optim.Optimizer,
    tokenizer: dict[str, bytes],
    state: dict[str, Any],
    *,
    averaged: Student | None,
) -> Path:
    """Write RUN/checkpoint-<step>, whole or not at all; `step` steps are done.

    averaged: the student to validate and export, where that is not the one in training. BadRun if it cannot be written.
    """
    final = run / f"{CHECKPOINT_PREFIX}{step:08d}"
    temporary = run / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_student(averaged or student, temporary / "student", tokenizer=tokenizer)
        if averaged is not None:
            trained = {name: value.detach().cpu().contiguous() for name, value in student.named_parameters()}
            save_file(trained, temporary / _TRAINED_FILE)
        save_file(_optimizer_tensors(student, optimizer), temporary / _OPTIMIZER_FILE)
        state = {"step": step, **state, "files": _checksums(temporary)}
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
        for file in temporary.rglob("*"):
            durable.sync(file)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        durable.sync(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise BadRun(
            f"{final} cannot be written ({_reason(error)}): the checkpoints before it are whole; make room (or mend "
            f"that) and give the same command again, it goes on from the last of them"
        ) from error
    return final


def load_checkpoint(
    run: Path,
    student: Student,
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
    *,
    averaged: Student | None,
) -> tuple[Path, dict[str, Any]] | None:
    """Restore all from the newest checkpoint that is whole; its folder and state, or None if there is none."""
    for leftover in run.glob(f".{CHECKPOINT_PREFIX}*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    folders = checkpoints(run)
    for folder in reversed(folders):
        try:
            state: dict[str, Any] = json.loads((folder / STATE_FILE).read_bytes())
            _check_files(folder, state)
            moments = load_file(folder / _OPTIMIZER_FILE)
            saved = load_student(folder / "student").state_dict()
            trained = saved if averaged is None else load_file(folder / _TRAINED_FILE)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, BadStudent, BadRun) as error:
            say(f"{folder} cannot be read ({_reason(error)}): going back to the checkpoint before it")
            continue
        if averaged is not None:
            averaged.load_state_dict(saved)
        # The parameters of an average name a tensor once that the student holds under two names.
        student.load_state_dict(trained, strict=averaged is None)
        _restore_optimizer(student, optimizer, moments)
        return folder, state
    if folders:
        say(f"none of the {len(folders)} checkpoints of {run} can be read: beginning again from step 0")
    return None


def mark_best(run: Path, folder: Path, loss: float) -> None:
    """Remember the checkpoint with the lowest validation loss."""
    durable.replace(run / BEST_FILE, (json.dumps({"checkpoint": folder.name, "loss": loss}) + "\n").encode())


def forget_old(newest: Path, keep: int) -> None:
    """Delete all checkpoints of a run but the last `keep`, up to the newest, and the best."""
    marker = newest.parent / BEST_FILE
    best = json.loads(marker.read_bytes())["checkpoint"] if marker.is_file() else None
    # Later ones are what could not be read when the run went on: they are written anew, and count for nothing.
    for folder in [folder for folder in checkpoints(newest.parent) if folder.name <= newest.name][:-keep]:
        if folder.name != best:
            shutil.rmtree(folder)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _checksum(path) for path in files}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return xxh3_128_of_parts(iter(lambda: file.read(_CHUNK_BYTES), b""))


def _check_files(folder: Path, state: dict[str, Any]) -> None:
    # Checkpoints of earlier versions have no checksums.
    for name, expected in state.get("files", {}).items():
        if (found := _checksum(folder / name)) != expected:
            raise BadRun(f"{name} has checksum {found}, expected {expected}")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _optimizer_tensors(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def _restore_optimizer(student: Student, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(student.named_parameters())
    for entry, value in tensors.items():
        key, name = entry.split("/", 1)
        # AdamW keeps its step count on the host.
        place = value if key == "step" else value.to(parameters[name].device)
        optimizer.state[parameters[name]][key] = place
