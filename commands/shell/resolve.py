"""What commands share: flags, names to folders, devices, files to write."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.formats.files import Verify as ChecksumTimes

if TYPE_CHECKING:
    from secondcast.models.teacher.context_projection import ContextProjection
    from secondcast.models.teacher.folder import TeacherFolder
    from secondcast.storage_schemas.schema.manifest import Teacher

POCKET = "pocket"


def silence_downloads(quiet: bool) -> bool:
    """Callback of --quiet: no bars of huggingface_hub either, which reads this when it is imported."""
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return quiet


def teacher_names(incomplete: str) -> list[str]:
    """Completion of --teacher; a shell completes folders where none of these begins so."""
    names = (POCKET, "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")
    return [name for name in names if name.startswith(incomplete)]


def student_names(incomplete: str) -> list[str]:
    """Completion of --student."""
    from secondcast.pocket import STUDENTS_FOLDER

    names = [*(f"{POCKET}-{folder.name}" for folder in sorted(STUDENTS_FOLDER.iterdir())), *_T5_NAMES]
    return [name for name in names if name.startswith(incomplete)]


TeacherName = Annotated[
    str,
    typer.Option(autocompletion=teacher_names, help="pocket, a folder in the FluxPipeline layout, or a hub name."),
]
_T5_NAMES = tuple(f"google-t5/t5-{size}" for size in ("small", "base", "large"))

BackboneName = Annotated[str | None, typer.Option(help="Where transformer/ and vae/ lie; default: as recorded.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub repository.")]
CachePath = Annotated[str, typer.Argument(metavar="CACHE", help="Folder of the cache, or s3://bucket/prefix.")]
Verify = Annotated[
    ChecksumTimes,
    typer.Option(help="Compare checksums of shard files never, once per file, or at every read."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=silence_downloads, help="No progress, no remarks.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1.")]


def terminal(quiet: bool = False) -> Any:
    """How progress is shown."""
    from secondcast.commands.shell.terminal import Terminal

    return Terminal(quiet=quiet)


def quiet_device(name: str) -> Any:
    """A device by name. Also silences the libraries' own bars and remarks."""
    from secondcast.models.device import quiet_libraries, usable_device

    quiet_libraries()
    return usable_device(name)


def launched_device(name: str, local_number: int | None) -> Any:
    """The device of one of several launched processes, by its number within the node (None: not launched)."""
    import torch

    if name in ("auto", "cuda") and local_number is not None and torch.cuda.is_available():
        # Asked for at once: to try the first GPU would take some of its memory for each process of the node.
        name = f"cuda:{local_number % torch.cuda.device_count()}"
    return quiet_device(name)


def resolve_teacher(
    name: str, parts: tuple[str, ...], revision: str | None = None, *, weights: bool = True
) -> "TeacherFolder":
    """A teacher by name; `pocket` is the embedded one, before any path of that name.

    weights: whether the weights of these parts are needed; TeacherError unless they are what is read, before any work.
    """
    from dataclasses import replace

    from secondcast.models.teacher.folder import find_teacher
    from secondcast.pocket import TEACHER_FOLDER

    if name == POCKET:
        found = replace(find_teacher(str(TEACHER_FOLDER), parts, revision=revision), source=POCKET)
    else:
        found = find_teacher(name, parts, revision=revision)
    if weights and not set(parts) <= {"scheduler", "tokenizer", "tokenizer_2"}:
        from secondcast.models.teacher.weights import check_teacher_weights

        check_teacher_weights(found, parts)
    return found


def resolve_context_projection(name: str, recorded: "Teacher") -> "ContextProjection":
    """The text projection of a teacher by name; of a hub's transformer that tensor alone is fetched."""
    from dataclasses import replace

    from secondcast.models.teacher.context_projection import find_context_projection
    from secondcast.pocket import TEACHER_FOLDER

    if name == POCKET:
        return replace(find_context_projection(str(TEACHER_FOLDER), recorded), source=POCKET)
    return find_context_projection(name, recorded)


def student_source(name: str) -> str:
    """A student to begin with; `pocket-small` and its like are the embedded configurations."""
    from secondcast.pocket import STUDENTS_FOLDER

    if not name.startswith(f"{POCKET}-") or Path(name).is_dir():
        return name
    known = sorted(f"{POCKET}-{folder.name}" for folder in STUDENTS_FOLDER.iterdir())
    if name not in known:
        raise SettingsError(f"--student {name!r} is not one of the embedded students, which are {', '.join(known)}")
    return str(STUDENTS_FOLDER / name.removeprefix(f"{POCKET}-"))
