"""A checkpoint on disk: its files, their checksums, and reading it, intact or not at all."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from secondcast.models.student.folder import STATE_FILE
from secondcast.models.student.student import load_student
from secondcast.models.weights.checked_loading import read_tensors
from secondcast.models.weights.files import CheckpointSource, read_header
from secondcast.models.weights.mismatch import Shape
from secondcast.storage_schemas.errors import RunError, StudentError, reason
from secondcast.storage_schemas.io.digests import digest, xxh3_128_of_parts

OPTIMIZER_FILE = "optimizer.safetensors"
# The parameters in training; without an EMA they are those of student/.
TRAINED_FILE = "trained.safetensors"
_CHUNK_BYTES = 2**24
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint on disk: its state, the student to evaluate, the one in training, the optimizer's moments."""

    folder: Path
    state: dict[str, Any]
    evaluated: dict[str, torch.Tensor]
    trained: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


class DamagedCheckpointError(RunError):
    """A file of a checkpoint is missing or damaged."""


def read_checkpoint(folder: Path, *, averaged: bool) -> SavedCheckpoint:
    """An intact checkpoint; DamagedCheckpointError, or RunError if the system denies or fails the read."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_bytes())
        _check_state(state)
        _check_files(folder, state)
        student = load_student(folder / "student")
        shapes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
        evaluated, moments = student.state_dict(), _read_moments(folder / OPTIMIZER_FILE, shapes)
        trained = _tensors(folder / TRAINED_FILE, shapes, "the student in training") if averaged else evaluated
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError, StudentError, RunError) as error:
        refused = error if isinstance(error, OSError) else error.__cause__
        if isinstance(refused, OSError) and not isinstance(refused, _NOT_THERE):
            raise _refused(folder, refused) from error
        raise DamagedCheckpointError(f"{folder} cannot be read ({reason(error)})") from error
    return SavedCheckpoint(folder=folder, state=state, evaluated=evaluated, trained=trained, moments=moments)


def _refused(folder: Path, error: OSError) -> RunError:
    where, why = error.filename or folder, error.strerror or str(error)
    if isinstance(error, PermissionError):
        return RunError(
            f"{where} cannot be read ({why}): the checkpoint is not damaged, nothing is changed; make its files "
            f"readable for this user and run the same command again"
        )
    return RunError(
        f"{where} cannot be read ({why}): the disk fails, nothing is changed; run the same command again when the disk "
        f"is readable, or restore {folder.name} from a backup"
    )


def _read_moments(file: Path, shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    """The optimizer's tensors; RunError unless each trained parameter has all of them, in its shape."""
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
    return CheckpointSource(where=file.name, error=RunError, again="it is damaged")


def _check_state(state: Any) -> None:
    if not isinstance(state, dict):
        raise RunError(f"{STATE_FILE} is not an object")
    rest = {key: value for key, value in state.items() if key != "digest"}
    if "digest" in state and (found := digest(rest)) != state["digest"]:
        raise RunError(f"{STATE_FILE} has digest {found}, expected {state['digest']}")


def _check_files(folder: Path, state: dict[str, Any]) -> None:
    if not state.get("files"):
        raise RunError(f"{STATE_FILE} lists no checksums")
    for name, expected in state["files"].items():
        if (found := _checksum(folder / name)) != expected:
            raise RunError(f"{name} has checksum {found}, expected {expected}")


def checksums(folder: Path) -> dict[str, str]:
    """The checksum of each file of a checkpoint, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _checksum(path) for path in files}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return xxh3_128_of_parts(iter(lambda: file.read(_CHUNK_BYTES), b""))
