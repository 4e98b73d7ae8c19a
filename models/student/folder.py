"""Find the student of a run or an export, without torch, so that errors come early.

A checkpoint of a run is a folder RUN/checkpoint-<step> whose state.json names that step and that run. Anything else
with such a name (a copy, a link, an archive) belongs to the user: it is neither read nor deleted.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from secondcast.storage_schemas.errors import StudentError
from secondcast.storage_schemas.io.digests import digest

CHECKPOINT_PREFIX = "checkpoint-"
STATE_FILE = "state.json"
BEST_FILE = "best.json"
INITIAL_FILE = "initial.json"
"""The record of `secondcast init-student` in the folder of its student."""
PUBLISHED_CLASS = "T5EncoderWithProjection"
STUDENT_KINDS = ("secondcast_student", "secondcast_encoder_student")
"""model_type of StudentConfig and of EncoderStudentConfig, whose exported modules cannot import this package."""
_NAME = re.compile(rf"{CHECKPOINT_PREFIX}(\d{{8,15}})")


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"{CHECKPOINT_PREFIX}{step:08d}"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint; None for another name."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found is not None and checkpoint_name(int(found[1])) == folder.name else None


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, including those with an unreadable state, which fail when read."""
    return [folder for folder in named_like_checkpoints(run) if is_of_run(folder) is not False]


def named_like_checkpoints(run: Path) -> list[Path]:
    """All entries of a run folder that are named like checkpoints, by step."""
    entries = [Path(entry) for entry in os.scandir(run)] if run.is_dir() else []
    return sorted((entry for entry in entries if step_of(entry) is not None), key=lambda entry: step_of(entry) or 0)


def is_of_run(folder: Path) -> bool | None:
    """Whether the run wrote this folder as the checkpoint of its name; None if its state cannot be read."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    state = stated(folder)
    if state is None:
        return None
    run = run_id(folder.parent)
    return state.get("step") == step_of(folder) and (run is None or state.get("run") in (None, run))


def stated(folder: Path) -> dict[str, Any] | None:
    """The state of a checkpoint; None if it is missing, damaged or unreadable."""
    try:
        state = json.loads((folder / STATE_FILE).read_bytes())
        if not isinstance(state, dict):
            return None
        with_digest = state.pop("digest", None)
        return state if with_digest in (None, digest(state)) else None
    except (OSError, ValueError, RecursionError):
        return None


def run_id(run: Path) -> str | None:
    """The id in a run's configuration; None if there is no readable one."""
    found = config_of(run).get("id")
    return found if isinstance(found, str) and found else None


def student_folder(path: Path) -> Path:
    """The folder of the student of a run (its best checkpoint, else its last) or of an export."""
    if path.is_file():
        raise StudentError(
            f"{path} is a single file without configuration and tokenizer: give the run folder, or an export --to "
            f"diffusers"
        )
    if not path.is_dir():
        raise _missing(path)
    found = checkpoints(path)
    if (best := best_checkpoint(path)) is not None:
        if not best[0].is_dir():
            raise StudentError(
                f"{path / BEST_FILE} names {best[0].name}, which does not exist: restore it, delete {BEST_FILE} to use "
                f"the last checkpoint, or give a checkpoint's student/ folder"
            )
        return best[0] / "student"
    if found:
        return found[-1] / "student"
    if (path / "metrics.jsonl").exists() or "settings" in config_of(path):
        raise StudentError(f"{path} has no checkpoint yet: run the `secondcast train` command again to resume")
    check_is_student(path)
    return path


def best_checkpoint(run: Path) -> tuple[Path, float] | None:
    """The best checkpoint of a run and its loss, from best.json; None if there is none.

    Raises StudentError for an unreadable best.json.
    """
    marker = run / BEST_FILE
    try:
        note = json.loads(marker.read_bytes())
        best, loss = run / str(note["checkpoint"]), float(note["loss"])
        if best.parent == run and step_of(best) is not None:
            return best, loss
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StudentError(
            f"{marker} cannot be read ({error.strerror}), and it names the best checkpoint: make it readable for this "
            f"user, or give a checkpoint's student/ folder"
        ) from error
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise StudentError(
        f"{marker} is not as `secondcast train` wrote it, so the best checkpoint is unknown: delete it to use the last "
        f"one, or give a checkpoint's student/ folder"
    )


def is_published_form(config: dict[str, Any]) -> bool:
    """Whether config.json is of the published class."""
    return PUBLISHED_CLASS in (config.get("architectures") or ())


def is_quantized(config: dict[str, Any]) -> bool:
    """Whether config.json is of a student with integer weights."""
    return config.get("model_type") == STUDENT_KINDS[0] and "quantization" in config


def weight_bytes(path: Path) -> int:
    """Bytes of the weight files of a saved student, or of an export that is one file."""
    return sum(file.stat().st_size for file in (path.glob("*.safetensors") if path.is_dir() else [path]))


def config_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """config.json of a folder, or another JSON object; empty if there is no readable one."""
    try:
        found = json.loads((folder / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_is_student(folder: Path) -> None:
    """Raise StudentError unless a folder exists and has the config.json of a student."""
    wanted = "give a run folder, or what `secondcast export` wrote"
    if not folder.is_dir():
        raise _missing(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise StudentError(f"{folder} has no student: it has no config.json; {wanted}")
    config = config_of(folder)
    if not config:
        raise StudentError(f"{file} cannot be read, expected the JSON of a student's configuration; {wanted}")
    kind = config.get("model_type")
    if kind not in STUDENT_KINDS and not is_published_form(config):
        raise StudentError(
            f"{folder} has no student (config.json has model_type {kind!r}, expected {STUDENT_KINDS[0]!r}): {wanted}"
        )


def _missing(folder: Path) -> StudentError:
    return StudentError(
        f"no student {folder}: there is no such folder; give a run folder, or what `secondcast export` wrote"
    )
