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

from models.student import BEST_FILE, CHECKPOINT_PREFIX, checkpoints, load_student, save_student
from models.student_network import UnderstudyStudent
from storage_schemas import durable
from storage_schemas.errors import BadStudent

KEPT = 2


def save_checkpoint(
    run: Path,
    step: int,
    student: UnderstudyStudent,
    optimizer: torch.optim.Optimizer,
    tokenizer: dict[str, bytes],
    state: dict[str, Any],
) -> Path:
    """Write RUN/checkpoint-<step> and delete all but the last ones and the best. `step` steps are done."""
    final = run / f"{CHECKPOINT_PREFIX}{step:08d}"
    temporary = run / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_student(student, temporary / "student", tokenizer=tokenizer)
    save_file(_optimizer_tensors(student, optimizer), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n")
    for file in temporary.rglob("*"):
        if file.is_file():
            durable.sync(file)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    durable.sync(run)
    _forget_old(run)
    return final


def load_checkpoint(
    run: Path, student: UnderstudyStudent, optimizer: torch.optim.Optimizer, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Restore student and optimizer from the newest readable checkpoint; its state, or None if there is none."""
    for folder in reversed(checkpoints(run)):
        try:
            state: dict[str, Any] = json.loads((folder / "state.json").read_bytes())
            moments = load_file(folder / "optimizer.safetensors")
            saved = load_student(folder / "student")
        except (OSError, ValueError, SafetensorError, BadStudent) as error:
            say(f"{folder} cannot be read ({str(error).splitlines()[0]}): going back to the checkpoint before it")
            continue
        student.load_state_dict(saved.state_dict())
        _restore_optimizer(student, optimizer, moments)
        return state
    return None


def mark_best(run: Path, folder: Path, loss: float) -> None:
    """Remember the checkpoint with the lowest validation loss."""
    durable.replace(run / BEST_FILE, (json.dumps({"checkpoint": folder.name, "loss": loss}) + "\n").encode())


def _forget_old(run: Path) -> None:
    marker = run / BEST_FILE
    best = json.loads(marker.read_bytes())["checkpoint"] if marker.is_file() else None
    for folder in checkpoints(run)[:-KEPT]:
        if folder.name != best:
            shutil.rmtree(folder)


def _optimizer_tensors(student: UnderstudyStudent, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    return tensors


def _restore_optimizer(
    student: UnderstudyStudent, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
) -> None:
    parameters = dict(student.named_parameters())
    for entry, value in tensors.items():
        key, name = entry.split("/", 1)
        # AdamW keeps its step count on the host.
        place = value if key == "step" else value.to(parameters[name].device)
        optimizer.state[parameters[name]][key] = place
