"""`understudy build`: phase 1."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from commands.resolve import CachePath, Device, Quiet, Settings, out, quiet_device, resolve_teacher, terminal


def build(
    cache: CachePath,
    teacher: Annotated[str, typer.Option(help="pocket, a folder in the FluxPipeline layout, or a hub name.")],
    prompts: Annotated[list[Path], typer.Option(help="Text file (a prompt per line) or JSON list; may be repeated.")],
    limit: Annotated[int | None, typer.Option(help="Only the first that many distinct prompts.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels per side; default 512, or the teacher's own.")] = None,
    steps: Annotated[int, typer.Option(help="Sampler steps per trajectory.")] = 20,
    replicas: Annotated[int, typer.Option(help="Trajectories per prompt.")] = 1,
    guidance: Annotated[str, typer.Option(help="One value, a list, or first:last:step.")] = "2.0:5.0:0.5",
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    batch_size: Annotated[int, typer.Option(help="May change on resume.")] = 16,
    shard_size: Annotated[int, typer.Option(help="Trajectories per shard.")] = 64,
    format: Literal["zarr", "webdataset"] = "zarr",
    codec: Annotated[
        Literal["plain", "compact", "int8"],
        typer.Option(help="compact: lossless; int8: predictions in 8 bits, with --latents stored."),
    ] = "compact",
    latents: Annotated[
        Literal["derived", "stored"], typer.Option(help="Store latents, or derive them exactly.")
    ] = "derived",
    embeddings: Annotated[
        Literal["stored", "none"], typer.Option(help="none: smaller, but no warm-up and no replay floor.")
    ] = "stored",
    extend: Annotated[
        bool, typer.Option("--extend", help="Add prompts or replicas to this cache; what it holds stays.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub repository.")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    settings: Settings = None,
) -> None:
    """Record the teacher over every prompt. Given again, it goes on where it stopped.

    Example: understudy build my-cache --teacher pocket --prompts prompts.txt
    """
    from cache_builder.settings import BuildSettings, guidance_values

    asked = BuildSettings.from_flags(
        prompts=tuple(prompts), limit=limit, resolution=resolution, steps=steps, replicas=replicas,
        guidance=guidance_values(guidance), seed=seed, dtype=dtype, batch_size=batch_size, shard_size=shard_size,
        format=format, codec=codec, latents=latents, embeddings=embeddings, extend=extend,
    )  # fmt: skip
    torch_device = quiet_device(device)
    from cache_builder.build import build as run_build
    from inspection.summary import size_text
    from models.teacher_folder import BUILD_PARTS

    result = run_build(cache, asked, resolve_teacher(teacher, BUILD_PARTS, revision), torch_device, terminal(quiet))
    out.print(
        f"{result.location}: {result.trajectories} trajectories of {result.prompts} prompts, {size_text(result.bytes)}",
        markup=False,
    )
