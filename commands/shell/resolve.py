"""Shared parts of the commands: flags, teachers and students by name, devices."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.formats.files import Verify as ChecksumTimes

if TYPE_CHECKING:
    from secondcast.models.families.family import Role
    from secondcast.models.teacher.context_projection import ContextProjection
    from secondcast.models.teacher.folder import TeacherFolder
    from secondcast.storage_schemas.schema.manifest import Teacher

POCKET = "pocket"


def silence_downloads(quiet: bool) -> bool:
    """Callback of --quiet: also disable the bars of huggingface_hub, which reads this at import."""
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return quiet


def teacher_names(incomplete: str) -> list[str]:
    """Completion of --teacher; if no name matches, the shell completes folders."""
    from secondcast.models.families.registry import FAMILIES

    names = (POCKET, *(f"{family.owner}/{model}" for family in FAMILIES for model in family.models))
    return [name for name in names if name.startswith(incomplete)]


def student_names(incomplete: str) -> list[str]:
    """Completion of --student."""
    from secondcast.pocket import STUDENTS_FOLDER

    names = [*(f"{POCKET}-{folder.name}" for folder in sorted(STUDENTS_FOLDER.iterdir())), *_T5_NAMES]
    return [name for name in names if name.startswith(incomplete)]


TeacherName = Annotated[
    str,
    typer.Option(
        autocompletion=teacher_names,
        help="Teacher: pocket, a folder of a diffusers pipeline, or a hub name.",
    ),
]
_T5_NAMES = tuple(f"google-t5/t5-{size}" for size in ("small", "base", "large"))

PromptSources = Annotated[
    list[str], typer.Option(metavar="SOURCE", help="Prompts, as for build --prompts; may be repeated.")
]
BackboneName = Annotated[str | None, typer.Option(help="Location of transformer/ and vae/. Default: as recorded.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the hub repository.")]
CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Folder of the cache, or s3://bucket/prefix.")]
Verify = Annotated[
    ChecksumTimes,
    typer.Option(help="When to verify checksums of shard files: off, once per file, or always (at every read)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=silence_downloads, help="Hide progress and notes.")]
Device = Annotated[str, typer.Option(help="Device: auto (a GPU if available), cpu, cuda, or for example cuda:1.")]


def terminal(quiet: bool = False) -> Any:
    """The progress display."""
    from secondcast.commands.shell.terminal import Terminal

    return Terminal(quiet=quiet)


def quiet_device(name: str) -> Any:
    """A device by name; also silences the progress bars and warnings of libraries."""
    from secondcast.models.device import quiet_libraries, usable_device

    quiet_libraries()
    return usable_device(name)


def quiet_imports() -> None:
    """Silence the warnings of libraries that the command may import later."""
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def launched_device(name: str, local_number: int | None) -> Any:
    """The device of one of several launched processes, by its local rank (None: not launched)."""
    import torch

    if name in ("auto", "cuda") and local_number is not None and torch.cuda.is_available():
        # Chosen directly: probing the first GPU would take memory on it for each process of the node.
        name = f"cuda:{local_number % torch.cuda.device_count()}"
    return quiet_device(name)


def resolve_teacher(
    name: str, parts: "tuple[Role, ...]", revision: str | None = None, *, weights: bool = True
) -> "TeacherFolder":
    """A teacher by name; `pocket` is the embedded one, even if a path of that name exists.

    weights: whether to check the weights of these parts before any work; TeacherError if they do not fit.
    """
    from dataclasses import replace

    from secondcast.models.teacher.folder import find_teacher
    from secondcast.pocket import TEACHER_FOLDER

    if name == POCKET:
        found = replace(find_teacher(str(TEACHER_FOLDER), parts, revision=revision), source=POCKET)
    else:
        found = find_teacher(name, parts, revision=revision)
    if weights and not set(parts) <= {"scheduler", "large_tokenizer", "pooled_tokenizer"}:
        from secondcast.models.teacher.weights import check_teacher_weights

        check_teacher_weights(found, parts)
    return found


def resolve_context_projection(
    name: str, recorded: "Teacher | None", revision: str | None = None
) -> "ContextProjection":
    """The text projection of a teacher by name; from the hub, only that tensor is downloaded."""
    from dataclasses import replace

    from secondcast.models.teacher.context_projection import find_context_projection
    from secondcast.pocket import TEACHER_FOLDER

    if name == POCKET:
        return replace(find_context_projection(str(TEACHER_FOLDER), recorded, revision=revision), source=POCKET)
    return find_context_projection(name, recorded, revision=revision)


def student_source(name: str) -> str:
    """The source of a student; names such as `pocket-small` are embedded configurations."""
    from secondcast.pocket import STUDENTS_FOLDER

    if not name.startswith(f"{POCKET}-") or Path(name).is_dir():
        return name
    known = sorted(f"{POCKET}-{folder.name}" for folder in STUDENTS_FOLDER.iterdir())
    if name not in known:
        raise SettingsError(f"--student {name!r} is not an embedded student, expected one of {', '.join(known)}")
    return str(STUDENTS_FOLDER / name.removeprefix(f"{POCKET}-"))
