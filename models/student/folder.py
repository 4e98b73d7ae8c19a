"""Where the student of a run or an export lies, and whether a folder holds one: without torch, told at once."""

import json
from pathlib import Path
from typing import Any

from secondcast.storage_schemas.errors import BadStudent

CHECKPOINT_PREFIX = "checkpoint-"
BEST_FILE = "best.json"
PUBLISHED_CLASS = "T5EncoderWithProjection"
STUDENT_KINDS = ("secondcast_student", "secondcast_encoder_student")
"""model_type of StudentConfig and of EncoderStudentConfig, whose modules are exported and import nothing of ours."""


def checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted(run.glob(f"{CHECKPOINT_PREFIX}*"))


def student_folder(path: Path) -> Path:
    """Where the student of a run folder (its best checkpoint, else its last) or of an export lies."""
    if path.is_file():
        raise BadStudent(
            f"{path} is one file, which holds neither a configuration nor a tokenizer: give the run folder, or an "
            f"export --to diffusers"
        )
    if not path.is_dir():
        raise _missing(path)
    found = checkpoints(path)
    if (best := _best(path)) is not None:
        return best / "student"
    if found:
        return found[-1] / "student"
    if (path / "metrics.jsonl").exists() or "settings" in config_of(path):
        raise BadStudent(f"{path} has no checkpoint yet: give the `secondcast train` command again to go on")
    check_is_student(path)
    return path


def _best(run: Path) -> Path | None:
    """The best checkpoint that a run has noted; None where it notes none that is still there."""
    marker = run / BEST_FILE
    if not marker.is_file():
        return None
    try:
        best = run / str(json.loads(marker.read_bytes())["checkpoint"])
    except (ValueError, LookupError, TypeError) as error:
        raise BadStudent(
            f"{marker} is not what `secondcast train` wrote, so the best checkpoint is not known: delete it for the "
            f"last one, or give a checkpoint's student/ folder"
        ) from error
    return best if best.is_dir() else None


def is_published_form(config: dict[str, Any]) -> bool:
    """Whether config.json is of the published class."""
    return PUBLISHED_CLASS in (config.get("architectures") or ())


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of a folder, empty where there is none that can be read."""
    try:
        found = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_is_student(folder: Path) -> None:
    """Raise BadStudent unless a folder is there and its config.json is that of a student."""
    wanted = "give a run folder, or what `secondcast export` wrote"
    if not folder.is_dir():
        raise _missing(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise BadStudent(f"{folder} holds no student: it has no config.json; {wanted}")
    config = config_of(folder)
    if not config:
        raise BadStudent(f"{file} cannot be read, expected the JSON of a student's configuration; {wanted}")
    kind = config.get("model_type")
    if kind not in STUDENT_KINDS and not is_published_form(config):
        raise BadStudent(
            f"{folder} holds no student (config.json says model_type {kind!r}, expected {STUDENT_KINDS[0]!r}): {wanted}"
        )


def _missing(folder: Path) -> BadStudent:
    return BadStudent(
        f"no student {folder}: expected a run folder, or what `secondcast export` wrote; there is no such folder"
    )
