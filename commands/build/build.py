"""`secondcast build`: phase 1."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from secondcast.commands.build.crew import Crew
from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.resolve import CachePath, Device, Quiet, Settings, TeacherName, resolve_teacher, terminal
from secondcast.storage_schemas.progress import counted, size_text

if TYPE_CHECKING:
    from secondcast.cache_builder.build import BuildResult


def build(
    cache: CachePath,
    teacher: TeacherName,
    prompts: Annotated[
        list[str],
        typer.Option(
            metavar="SOURCE",
            help="File (a prompt per line; .json, .jsonl, .csv, .tsv, .parquet), - or hf:NAME, with any of :name= "
            ":limit= :repeat= (times the replicas) :column= :split= :config= :revision= behind it; may be repeated.",
        ),
    ],
    limit: Annotated[int | None, typer.Option(help="Only the first that many distinct prompts.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels per side; default 512, or the teacher's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; with --width, in place of --resolution.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; with --height.")] = None,
    text_length: Annotated[
        int | None, typer.Option(help="T5 tokens, up to 512; default 77, or the teacher's own.")
    ] = None,
    pooled: Annotated[Literal["zero", "clip"], typer.Option(help="FLUX's pooled input; zero: the paper's.")] = "zero",
    schedule: Annotated[
        Literal["pipeline", "reference"], typer.Option(help="FluxPipeline's sigmas, or those of the paper's script.")
    ] = "pipeline",
    steps: Annotated[int, typer.Option(help="Sampler steps per trajectory.")] = 20,
    replicas: Annotated[int, typer.Option(help="Trajectories per prompt.")] = 1,
    guidance: Annotated[str, typer.Option(help="One value, a list, or first:last:step.")] = "2.0:5.0:0.5",
    seed: Annotated[int, typer.Option(help="The noise is a function of seed, prompt and replica.")] = 0,
    dtype: Annotated[
        Literal["bfloat16", "float32"], typer.Option(help="Of the teacher's arithmetic and of what is stored.")
    ] = "bfloat16",
    quantize: Annotated[
        Literal["none", "int8", "fp8", "nf4"],
        typer.Option(help="Sample with the transformer's weights in 8 or 4 bits, for training with the same."),
    ] = "none",
    batch_size: Annotated[int, typer.Option(help="May change on resume.")] = 16,
    shard_size: Annotated[int, typer.Option(help="Trajectories per shard.")] = 64,
    format: Annotated[
        Literal["zarr", "webdataset"], typer.Option(help="zarr: sharded arrays; webdataset: tar files.")
    ] = "zarr",
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
    stage: Annotated[
        Literal["all", "text", "sample"], typer.Option(help="text: embeddings only; sample: the rest, with them there.")
    ] = "all",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes on this machine, a GPU each.")] = None,
    worker: Annotated[
        str | None, typer.Option(metavar="I/N", help="This process makes the shards I, I + N, ...; I from 0.")
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to wait for embeddings made elsewhere. Default: 1800 with several workers."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Ray cluster to build on: local, auto, host:port, ray://host:port. --device cuda waits for GPUs.",
        ),
    ] = None,
    ray_runtime_env: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML or JSON file with Ray's runtime environment of workers.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each worker.")] = None,
    attention_backend: Annotated[
        str | None, typer.Option(help="diffusers' attention backend for FLUX; default: torch's own.")
    ] = None,
    pilot: Annotated[
        int | None,
        typer.Option(min=1, help="Build the first shards with that many trajectories, check them, extrapolate."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Begin even where the disk looks too small.")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    settings: Settings = None,
) -> None:
    """Record the teacher over every prompt. Given again, it goes on where it stopped.

    Example: secondcast build my-cache --teacher pocket --prompts prompts.txt
    """
    from secondcast.cache_builder.settings import BuildSettings, guidance_values

    asked = BuildSettings.from_flags(
        prompts=tuple(prompts), limit=limit, resolution=resolution, steps=steps, replicas=replicas,
        guidance=guidance_values(guidance), seed=seed, dtype=dtype, batch_size=batch_size, shard_size=shard_size,
        format=format, codec=codec, latents=latents, embeddings=embeddings,
        height=height, width=width, text_length=text_length, pooled=pooled, schedule=schedule,
        attention_backend=attention_backend, force=force, extend=extend, quantize=quantize,
    )  # fmt: skip
    crew = Crew(
        stage=stage, workers=workers, worker=worker, wait=wait, ray=ray, threads=threads, device=device,
        ray_runtime_env=ray_runtime_env,
    )  # fmt: skip
    torch_device = crew.own_device()
    from secondcast.models.teacher.folder import build_parts

    found = resolve_teacher(teacher, build_parts(asked.pooled), revision)
    if pilot is not None:
        crew.check_alone("--pilot")
        from secondcast.cache_builder.checks.pilot import run_pilot
        from secondcast.commands.build.pilot import print_pilot

        print_pilot(run_pilot(cache, asked, found, torch_device, terminal(quiet), count=pilot))
        return
    _report(crew.build(cache, asked, found, torch_device, terminal(quiet)))


def _report(result: "BuildResult") -> None:
    made = counted(result.planned, "trajectory")
    if not result.finished:
        made = f"{result.trajectories} of {made}"
    print_line(
        f"{result.location}: {made} of {result.prompts} prompts, {size_text(result.bytes)}",
    )
    if not result.finished:
        left = f"{result.embeddings} of {result.prompts} embeddings are there"
        print_line(f"{left}; the build is finished when every worker has made its share")
