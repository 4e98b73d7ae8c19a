"""Shared parts of the commands: flags, teachers and students by name, devices."""

import os
from typing import Annotated, Any

import typer

from secondcast.api.names import POCKET as POCKET
from secondcast.api.names import resolve_context_projection as resolve_context_projection
from secondcast.api.names import resolve_teacher as resolve_teacher
from secondcast.api.names import student_source as student_source
from secondcast.storage_schemas.formats.files import Verify as ChecksumTimes


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
    from secondcast.api.terminal import Terminal

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
