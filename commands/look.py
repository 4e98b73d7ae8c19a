"""The commands that look into a cache."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from commands.resolve import (CachePath, Device, Json, Verify, out, print_lines, quiet_device, resolve_teacher, terminal_width, write_picture)
from storage_schemas.errors import BadSettings

if TYPE_CHECKING:
    from storage_schemas.reader import Cache

inspect_app = typer.Typer(no_args_is_help=True, help="Look into a cache.")


@inspect_app.command("summary")
def inspect_summary(cache: CachePath, as_json: Json = False) -> None:
    """What a cache is, on one screen.

    Example: understudy inspect summary my-cache
    """
    from inspection.summary import summarise
    from inspection.summary_text import screen_lines
    from storage_schemas.reader import Cache

    facts = summarise(Cache.open(cache))
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    print_lines(screen_lines(facts, width=terminal_width()))


@inspect_app.command("show")
def inspect_show(
    cache: CachePath,
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="Number or key of a trajectory.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The trajectory of this text.")] = None,
    grep: Annotated[str | None, typer.Option(help="List the prompts with this word.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Longest list.")] = 50,
    verify: Verify = "once",
    as_json: Json = False,
) -> None:
    """One trajectory in numbers, or the prompts with a word.

    Example: understudy inspect show my-cache 12
    """
    from inspection.show import describe, find_prompts, first_trajectory, trajectory_lines
    from storage_schemas.reader import Cache

    if sum(given is not None for given in (key, prompt, grep)) != 1:
        raise BadSettings("inspect show needs one of KEY, --prompt TEXT and --grep WORD")
    opened = Cache.open(cache, verify=verify)
    if grep is not None:
        _print_prompts(find_prompts(opened, grep, limit=limit), grep, limit, as_json)
        return
    if prompt is not None:
        index = first_trajectory(opened, opened.prompts.find(prompt))
    else:
        index = opened.key_index(key or "")
    facts = describe(opened, index)
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    print_lines(trajectory_lines(facts, cache, width=terminal_width()))


def _print_prompts(found: list[tuple[int, str, str]], word: str, limit: int, as_json: bool) -> None:
    from inspection.text_layout import wrapped

    more, found = len(found) > limit, found[:limit]
    if as_json:
        print(json.dumps([{"index": i, "id": identity, "prompt": text} for i, identity, text in found], indent=1))
        return
    width = terminal_width()
    for index, identity, text in found:
        first, *others = wrapped(text, width=None if width is None else width - 24)
        print_lines([f"{index:>8}  {identity[:12]}  {first}", *(" " * 24 + line for line in others)])
    print_lines([f"the first {limit}: --limit shows more" if more else f"{len(found)} prompts with {word!r}"])


@inspect_app.command("diff")
def inspect_diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a cache, or s3://bucket/prefix.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    as_json: Json = False,
) -> None:
    """In which fields two caches differ, what follows, and whether they can be merged or train together.

    Example: understudy inspect diff my-cache other-cache
    """
    from inspection.diff import compare, diff_lines
    from storage_schemas.reader import Cache

    facts = compare(Cache.open(a), Cache.open(b))
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    for line in diff_lines(facts):
        out.print(line, markup=False)


@inspect_app.command("images")
def inspect_images(
    cache: CachePath,
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Default: the first four.")] = None,
    out_file: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("film-strips.png"),
    frames: Annotated[int, typer.Option(min=1, help="Steps shown per trajectory.")] = 8,
    teacher: Annotated[str | None, typer.Option(help="Where vae/ lies here; default: as recorded.")] = None,
    verify: Verify = "once",
    device: Device = "auto",
) -> None:
    """Film strips of trajectories: latents and predicted clean images, decoded by the teacher's VAE.

    Example: understudy inspect images my-cache 0 7 --out strips.png
    """
    from storage_schemas.reader import Cache

    opened = Cache.open(cache, verify=verify)
    indices = [opened.key_index(key) for key in keys] if keys else [int(i) for i in opened.indices()[:4]]
    write_film_strips(opened, indices, frames, teacher, device, out_file)
    out.print(f"{len(indices)} film strips in {out_file}", markup=False)


def write_film_strips(
    cache: "Cache", indices: list[int], frames: int, teacher: str | None, device: str, path: Path
) -> None:
    """Write film strips of trajectories to a PNG."""
    torch_device = quiet_device(device)
    from inspection.images import film_strips
    from models.teacher_folder import DECODE_PARTS

    folder = resolve_teacher(teacher or cache.manifest.source, DECODE_PARTS)
    write_picture(film_strips(cache, folder, indices, frames=frames, device=torch_device), path)
