"""Checkpoints of a run: safetensors and JSON, written whole or not at all, the last one readable wins."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from secondcast.models.student.student import (
    BEST_FILE,
    CHECKPOINT_PREFIX,
    Student,
    checkpoints,
    load_student,
    save_student,
)
from secondcast.models.weights.checked_loading import read_tensors
from secondcast.models.weights.files import CheckpointSource, StoredTensor, read_header
from secondcast.models.weights.mismatch import Shape, compared
from secondcast.storage_schemas.errors import BadRun, BadStudent
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import xxh3_128_of_parts
from secondcast.trainer.distributed.processes import ALONE, Processes
from secondcast.trainer.distributed.sharding import held_as, load_tensors, whole_tensors

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
    processes: Processes = ALONE,
    shell: Student | None = None,
) -> Path:
    """Write RUN/checkpoint-<step>, whole or not at all; `step` steps are done. All processes call it, one writes.

    averaged: the student to validate and export, where that is not the one in training. shell: where processes share
    one student, an undivided one of the process that writes. BadRun if it cannot be written.
    """
    keep = processes.is_first
    tensors = {_OPTIMIZER_FILE: whole_tensors(_optimizer_tensors(student, optimizer), keep=keep)}
    if averaged is not None:
        tensors[_TRAINED_FILE] = whole_tensors(student.named_parameters(), keep=keep)
    judged = averaged or student
    if processes.sharded:
        whole = whole_tensors(judged.named_parameters(), keep=keep)
        if shell is not None:
            shell.load_state_dict(whole, strict=False)
            judged = shell
    final = run / f"{CHECKPOINT_PREFIX}{step:08d}"
    processes.from_first(lambda: _write(final, judged, tokenizer, tensors, {"step": step, **state}))
    return final


def _write(
    final: Path,
    student: Student,
    tokenizer: dict[str, bytes],
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
) -> None:
    temporary = final.parent / f".{final.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_student(student, temporary / "student", tokenizer=tokenizer)
        for name, named in tensors.items():
            save_file(named, temporary / name)
        state = {**state, "files": _checksums(temporary)}
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n")
        for file in temporary.rglob("*"):
            durable.sync(file)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        durable.sync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise BadRun(
            f"{final} cannot be written ({_reason(error)}): the checkpoints before it are whole; make room (or mend "
            f"that) and give the same command again, it goes on from the last of them"
        ) from error


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """A checkpoint as it lies on disk: its state, the student to judge, the one in training, the moments."""

    folder: Path
    state: dict[str, Any]
    judged: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def load_checkpoint(
    run: Path,
    student: Student,
    optimizer: torch.optim.Optimizer,
    say: Callable[[str], None],
    *,
    averaged: Student | None,
    processes: Processes = ALONE,
) -> tuple[Path, dict[str, Any]] | None:
    """Restore all from the newest checkpoint that is whole; its folder and state, or None if there is none.

    The first process says which one that is, all read it.
    """
    saved: _Saved | None = None

    def name_of_newest() -> str | None:
        nonlocal saved
        saved = _newest_whole(run, say, averaged=averaged is not None)
        return saved.folder.name if saved is not None else None

    name = processes.from_first(name_of_newest)
    if name is None:
        return None
    saved = saved or _read(run / name, averaged=averaged is not None)
    _check_same_student(saved, averaged or student)
    if averaged is not None:
        load_tensors(averaged, saved.judged, strict=True)
    # The parameters of an average name a tensor once that the student holds under two names.
    load_tensors(student, saved.trained, strict=averaged is None)
    _restore_optimizer(student, optimizer, saved.moments)
    return saved.folder, saved.state


def _newest_whole(run: Path, say: Callable[[str], None], *, averaged: bool) -> _Saved | None:
    for leftover in run.glob(f".{CHECKPOINT_PREFIX}*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    folders = checkpoints(run)
    for folder in reversed(folders):
        try:
            return _read(folder, averaged=averaged)
        except BadRun as error:
            say(f"{error}: going back to the checkpoint before it")
    if folders:
        say(f"none of the {len(folders)} checkpoints of {run} can be read: beginning again from step 0")
    return None


def _read(folder: Path, *, averaged: bool) -> _Saved:
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_bytes())
        _check_files(folder, state)
        student = load_student(folder / "student")
        shapes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
        judged, moments = student.state_dict(), _read_moments(folder / _OPTIMIZER_FILE, shapes)
        trained = _tensors(folder / _TRAINED_FILE, shapes, "the student in training") if averaged else judged
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, BadStudent, BadRun) as error:
        raise BadRun(f"{folder} cannot be read ({_reason(error)})") from error
    return _Saved(folder=folder, state=state, judged=judged, trained=trained, moments=moments)


def _read_moments(file: Path, shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    """The optimizer's tensors; BadRun unless each parameter that has some has all of them, in its shape."""
    entries = [name.partition("/") for name, _ in read_header(file, _source(file))]
    keys, trained = dict.fromkeys(key for key, _, _ in entries), {name for _, _, name in entries}
    expected = {
        f"{key}/{name}": () if key == "step" else shape
        for name, shape in shapes.items()
        if name in trained
        for key in keys
    }
    return _tensors(file, expected, "the optimizer")


def _tensors(file: Path, expected: Mapping[str, Shape], kind: str) -> dict[str, torch.Tensor]:
    return read_tensors(file, expected, _source(file), kind=kind)


def _source(file: Path) -> CheckpointSource:
    return CheckpointSource(where=file.name, error=BadRun, again="it is damaged")


def _check_same_student(saved: _Saved, student: Student) -> None:
    held = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    tensors = {name: StoredTensor(shape=tuple(tensor.shape), dtype="F32") for name, tensor in saved.judged.items()}
    if mismatch := compared("the student to be trained", held, tensors):
        source = CheckpointSource(where=str(saved.folder), error=BadRun, again="")
        raise mismatch.error(source, fix="give the --student that the run began with, or a new run folder")


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
    if not state.get("files"):
        raise BadRun(f"{STATE_FILE} lists no checksums")
    for name, expected in state["files"].items():
        if (found := _checksum(folder / name)) != expected:
            raise BadRun(f"{name} has checksum {found}, expected {expected}")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _optimizer_tensors(student: Student, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}/{name}", value


def _restore_optimizer(student: Student, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    parameters = dict(student.named_parameters())
    for entry, value in tensors.items():
        key, name = entry.split("/", 1)
        # AdamW keeps its step count on the host.
        place = value if key == "step" else held_as(value, parameters[name])
        optimizer.state[parameters[name]][key] = place
