"""`secondcast inspect reading`: what the transformer reads of the teacher's embedding."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secondcast.commands.shell.console import print_json, print_lines, terminal_width
from secondcast.commands.shell.resolve import (
    POCKET,
    BackboneName,
    CachePath,
    Device,
    Json,
    Quiet,
    Verify,
    quiet_device,
    resolve_teacher,
    terminal,
)
from secondcast.inspection.reading.settings import ReadingOptions

if TYPE_CHECKING:
    from secondcast.inspection.reading.spread import PromptLists
    from secondcast.models.families.family import Role
    from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache

_TEXT_PARTS: "tuple[Role, ...]" = ("transformer", "large_text_encoder", "large_tokenizer")


def inspect_reading(
    cache: CachePath,
    teacher: Annotated[
        str | None,
        typer.Option(help="Teacher with its large text encoder, to compare lists of visual and non-visual prompts."),
    ] = None,
    options: ReadingOptions = ReadingOptions(),
    backbone: BackboneName = None,
    verify_checksums: Verify = "once",
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what the transformer reads of the embedding, without training: by rank, of padding, between prompts.

    Example: secondcast inspect reading my-cache --teacher pocket
    """
    from secondcast.models.families.registry import family_named
    from secondcast.storage_schemas.reader import Cache

    opened = Cache.open(cache, verify=verify_checksums)
    opened.require_trajectories("inspect reading")
    if opened.manifest.teacher.text_mask is not None:
        title = family_named(opened.manifest.teacher.family).title
        raise SettingsError(
            f"{cache} is of {title}, which masks padding, expected a teacher that reads it, such as FLUX.1: inspect "
            f"reading counts padding; give another cache"
        )
    options.ranks_on(opened.manifest.teacher.text_width)
    torch_device = quiet_device(device)
    from secondcast.inspection.reading.reading import read_embedding, reading_facts
    from secondcast.inspection.reading.reading_text import reading_lines
    from secondcast.models.teacher.folder import REPLAY_PARTS

    lists = None if teacher is None else _lists(opened, teacher)
    transformer = resolve_teacher(backbone or teacher or opened.manifest.source, REPLAY_PARTS)
    reading = read_embedding(
        opened, transformer, options, lists=lists, device=torch_device, progress=terminal(quiet)
    )  # fmt: skip
    missing = {} if lists is not None else {"spread_missing": _missing(opened, teacher)}
    facts = reading_facts(reading) | missing
    if as_json:
        print_json(facts)
        return
    print_lines(reading_lines(facts, width=terminal_width()))


def _lists(cache: "Cache", teacher: str) -> "PromptLists | None":
    """The prompt lists for a teacher; None if its folder has no text encoder."""
    from secondcast.inspection.reading.spread import PROMPTS_FOLDER, PromptLists, read_prompts
    from secondcast.models.teacher.folder import find_teacher
    from secondcast.pocket import PROMPTS_FOLDER as POCKET_PROMPTS

    if teacher != POCKET and Path(teacher).is_dir() and not find_teacher(teacher, ()).has("large_text_encoder"):
        return None
    folder = POCKET_PROMPTS if POCKET in (teacher, cache.manifest.source) else PROMPTS_FOLDER
    return PromptLists(texts=read_prompts(folder), teacher=resolve_teacher(teacher, _TEXT_PARTS))


def _missing(cache: "Cache", teacher: str | None) -> str:
    from secondcast.models.families.registry import family_named

    slot = family_named(cache.manifest.teacher.family).slot
    if teacher is None:
        return f"it needs the teacher's text encoder: give the recorded teacher, with {slot}/, by --teacher"
    return f"{teacher} has no {slot}/: download the whole repository, or give another --teacher"
