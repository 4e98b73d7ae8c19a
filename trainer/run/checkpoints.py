"""Checkpoints of a run: safetensors and JSON, written atomically; the newest intact one is loaded."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from secondcast.models.student.folder import (
    STATE_FILE,
    best_checkpoint,
    checkpoint_name,
    is_of_run,
    named_like_checkpoints,
    run_id,
    stated,
    step_of,
)
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
from secondcast.storage_schemas.errors import RunError, StudentError, reason
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import digest, xxh3_128_of_parts
from secondcast.trainer.distributed.processes import SINGLE_PROCESS, Distributed
from secondcast.trainer.distributed.sharding import full_tensors, held_as, load_tensors

_CHUNK_BYTES = 2**24
_OPTIMIZER_FILE = "optimizer.safetensors"
# The parameters in training; without an EMA they are those of student/.
_TRAINED_FILE = "trained.safetensors"
# Folders that are being written or deleted.
_TEMPORARY = re.compile(rf"\.{CHECKPOINT_PREFIX}\d{{8,}}\.\d+\.tmp")


def save_checkpoint(
    run: Path,
    step: int,
    student: Student,
    optimizer: torch.optim.Optimizer,
    tokenizer: dict[str, bytes],
    state: dict[str, Any],
    say: Callable[[str], None],
    *,
    averaged: Student | None,
    processes: Distributed = SINGLE_PROCESS,
    full_student: Student | None = None,
) -> Path:
    """Atomically write RUN/checkpoint-<step> after `step` steps. All processes call it, the first one writes.

    An entry of that name that is not a checkpoint of the run is renamed and reported with `say`.

    averaged: the student to validate and export (an EMA), if it is not the one in training.
    full_student: an unsharded student of the writing process, if the student is sharded.

    Raises RunError if the checkpoint cannot be written.
    """
    keep = processes.is_main_process
    tensors = {_OPTIMIZER_FILE: full_tensors(_optimizer_tensors(student, optimizer), keep=keep)}
    if averaged is not None:
        tensors[_TRAINED_FILE] = full_tensors(student.named_parameters(), keep=keep)
    judged = averaged or student
    if processes.sharded:
        whole = full_tensors(judged.named_parameters(), keep=keep)
        if full_student is not None:
            full_student.load_state_dict(whole, strict=False)
            judged = full_student
    final = run / checkpoint_name(step)
    processes.broadcast_from_rank0(lambda: _write(final, judged, tokenizer, tensors, {"step": step, **state}, say))
    return final


def _write(
    final: Path,
    student: Student,
    tokenizer: dict[str, bytes],
    tensors: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    temporary = _temporary(final)
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_student(student, temporary / "student", tokenizer=tokenizer)
        for name, named in tensors.items():
            save_file(named, temporary / name)
            (temporary / name).chmod(durable.usual_mode(temporary))
        state = {**state, "run": run_id(final.parent), "files": _checksums(temporary)}
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


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}.{os.getpid()}.tmp")


def _make_way(final: Path, say: Callable[[str], None]) -> None:
    """Delete a checkpoint that is written again; rename anything else, or an unreadable one, to a free name."""
    if is_of_run(final):
        _delete(final)
        return
    free = next(name for n in range(1, 10**6) if not os.path.lexists(name := final.with_name(f"{final.name}-kept-{n}")))
    final.rename(free)
    say(f"{final} is not a readable checkpoint of this run: renamed to {free.name}")


def _delete(checkpoint: Path) -> None:
    # Rename first: a kill leaves an intact checkpoint or none.
    gone = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}0.tmp")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def sweep(run: Path) -> None:
    """Delete partial checkpoints of a process that was killed while it wrote or deleted them."""
    for leftover in run.iterdir():
        if _TEMPORARY.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class _Saved:
    """A checkpoint on disk: its state, the student to evaluate, the one in training, the optimizer's moments."""

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
    processes: Distributed = SINGLE_PROCESS,
) -> tuple[Path, dict[str, Any]] | None:
    """Restore everything from the newest intact checkpoint; its folder and state, or None if there is none.

    The first process selects it, all processes read it.
    """
    saved: _Saved | None = None

    def name_of_newest() -> str | None:
        nonlocal saved
        saved = _newest_whole(run, say, averaged=averaged is not None)
        return saved.folder.name if saved is not None else None

    name = processes.broadcast_from_rank0(name_of_newest)
    if name is None:
        return None
    saved = saved or _read(run / name, averaged=averaged is not None)
    _check_same_student(saved, averaged or student)
    if averaged is not None:
        load_tensors(averaged, saved.judged, strict=True)
    # With an EMA a tied tensor is saved under one of its two names.
    load_tensors(student, saved.trained, strict=averaged is None)
    restore_optimizer(student, optimizer, saved.moments)
    return saved.folder, saved.state


def _newest_whole(run: Path, say: Callable[[str], None], *, averaged: bool) -> _Saved | None:
    sweep(run)
    folders = checkpoints(run)
    for other in [path for path in named_like_checkpoints(run) if path not in folders]:
        say(f"{other} is not a checkpoint that this run wrote under this name: ignored")
    problems: list[_DamagedCheckpointError] = []
    for folder in reversed(folders):
        try:
            saved = _read(folder, averaged=averaged)
        except _DamagedCheckpointError as error:
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


class _DamagedCheckpointError(RunError):
    """A file of a checkpoint is missing or damaged."""


def _read(folder: Path, *, averaged: bool) -> _Saved:
    """An intact checkpoint; _DamagedCheckpointError, or RunError if the system denies or fails the read."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_bytes())
        _check_state(state)
        _check_files(folder, state)
        student = load_student(folder / "student")
        shapes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
        judged, moments = student.state_dict(), _read_moments(folder / _OPTIMIZER_FILE, shapes)
        trained = _tensors(folder / _TRAINED_FILE, shapes, "the student in training") if averaged else judged
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError, StudentError, RunError) as error:
        refused = error if isinstance(error, OSError) else error.__cause__
        if isinstance(refused, OSError) and not isinstance(refused, _NOT_THERE):
            raise _refused(folder, refused) from error
        raise _DamagedCheckpointError(f"{folder} cannot be read ({reason(error)})") from error
    return _Saved(folder=folder, state=state, judged=judged, trained=trained, moments=moments)


_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


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


def _check_same_student(saved: _Saved, student: Student) -> None:
    held = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    tensors = {name: StoredTensor(shape=tuple(tensor.shape), dtype="F32") for name, tensor in saved.judged.items()}
    if mismatch := compared("the student to be trained", held, tensors):
        source = CheckpointSource(where=str(saved.folder), error=RunError, again="")
        raise mismatch.error(source, fix="give the --student of the run, or a new run folder")


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
            _delete(folder)


def _up_to(newest: Path) -> list[Path]:
    return [folder for folder in checkpoints(newest.parent) if (step_of(folder) or 0) <= (step_of(newest) or 0)]


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): _checksum(path) for path in files}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return xxh3_128_of_parts(iter(lambda: file.read(_CHUNK_BYTES), b""))


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


def _optimizer_tensors(student: Student, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"{key}/{name}", value


def restore_optimizer(student: Student, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back the state of a checkpoint; tensors: by key and name of the parameter."""
    parameters = dict(student.named_parameters())
    for entry, value in tensors.items():
        key, name = entry.split("/", 1)
        parameter = parameters[name]
        # AdamW keeps its step count on the host, but for its fused kernel.
        counted = value.to(parameter.device) if optimizer.defaults["fused"] else value
        optimizer.state[parameter][key] = counted if key == "step" else held_as(value, parameter)
