"""The commands that look into a cache."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from commands.resolve import CachePath, Device, Json, Verify, out, quiet_device, resolve_teacher, write_picture
from storage_schemas.errors import BadSettings

if TYPE_CHECKING:
    from storage_schemas.reader import Cache

inspect_app = typer.Typer(no_args_is_help=True, help="Look into a cache.")


@inspect_app.command("summary")
def inspect_summary(cache: CachePath, as_json: Json = False) -> None:
    """What a cache is, on one screen.

    Example: understudy inspect summary my-cache
    """
    from inspection.summary import summarise, summary_lines
    from storage_schemas.reader import Cache

    facts = summarise(Cache.open(cache))
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    for name, value in summary_lines(facts):
        out.print(f"{name:>12}  {value}", markup=False)


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
    from inspection.show import describe, find_prompts
    from storage_schemas.reader import Cache

    if sum(given is not None for given in (key, prompt, grep)) != 1:
        raise BadSettings("inspect show needs one of KEY, --prompt TEXT and --grep WORD")
    opened = Cache.open(cache, verify=verify)
    if grep is not None:
        found = find_prompts(opened, grep, limit=limit)
        more, found = len(found) > limit, found[:limit]
        if as_json:
            print(json.dumps([{"index": i, "id": identity, "prompt": text} for i, identity, text in found], indent=1))
            return
        for index, identity, text in found:
            out.print(f"{index:>8}  {identity[:12]}  {text}", markup=False)
        first = f"the first {limit}: --limit shows more" if more else f"{len(found)} prompts with {grep!r}"
        out.print(first, markup=False)
        return
    index = opened.prompts.find(prompt) if prompt is not None else opened.key_index(key or "")
    facts = describe(opened, index)
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    _print_trajectory(facts)


def _print_trajectory(facts: dict[str, Any]) -> None:
    for name in ("index", "key", "prompt", "sources", "held_out", "replica", "seed", "guidance", "tokens"):
        value = facts[name]
        out.print(f"{name:>10}  {' '.join(value) if isinstance(value, list) else value}", markup=False)
    table = Table("step", "sigma", "timestep", "latent rms", "velocity rms", "clean latent moved", "non-finite")
    for step in facts["steps"]:
        moved = step["clean_latent_moved"]
        table.add_row(
            str(step["step"]), f"{step['sigma']:.4f}", f"{step['timestep']:.4f}", f"{step['latent_rms']:.4f}",
            f"{step['velocity_rms']:.4f}", "" if moved is None else f"{moved:.4f}", str(step["non_finite"]),
        )  # fmt: skip
    out.print(table)
    out.print(f"final latent rms {facts['final_latent_rms']:.4f}", markup=False)


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
