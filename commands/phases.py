"""The commands of the two phases: prompts, build, train, export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from commands.resolve import (
    CachePath,
    Device,
    Quiet,
    Settings,
    Verify,
    out,
    quiet_device,
    resolve_teacher,
    student_source,
    terminal,
    write_text,
)
from storage_schemas.errors import BadSettings

prompts_app = typer.Typer(no_args_is_help=True, help="Make prompt sets.")


@prompts_app.command("pocket")
def prompts_pocket(
    out_file: Annotated[Path, typer.Argument(metavar="FILE", help="Text file to write, a prompt per line.")],
    count: Annotated[int, typer.Option(min=1, help="How many distinct captions.")] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    split: Annotated[
        Literal["train", "heldout"], typer.Option(help="heldout: compositions never trained on.")
    ] = "train",
) -> None:
    """Captions of the pocket world.

    Example: understudy prompts pocket prompts.txt --count 1024
    """
    from pocket.world import captions

    try:
        texts = captions(count, seed=seed, split=split)
    except ValueError as error:
        raise BadSettings(f"--count {count}: {error}") from error
    write_text(out_file, "".join(f"{text}\n" for text in texts))
    out.print(f"{len(texts)} captions in {out_file}", markup=False)


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
        format=format, codec=codec, latents=latents, embeddings=embeddings,
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


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    cache: Annotated[str, typer.Option(help="Folder of the cache, or s3://bucket/prefix.")],
    student: Annotated[str, typer.Option(help="T5 folder or hub name, a config alone, an export; pocket-small.")],
    backbone: Annotated[str | None, typer.Option(help="Where transformer/ lies here; default: as recorded.")] = None,
    init: Annotated[
        Literal["auto", "pretrained", "random"], typer.Option(help="auto: pretrained where there are weights.")
    ] = "auto",
    steps: Annotated[int, typer.Option(help="Optimizer steps with the vision loss.")] = 1000,
    warmup_steps: Annotated[int, typer.Option(help="Steps with the embedding loss before them.")] = 0,
    batch_size: int = 32,
    order: Annotated[Literal["shuffled", "following"], typer.Option(help="following: the paper's.")] = "shuffled",
    learning_rate: float = 1e-4,
    warmup_learning_rate: Annotated[float | None, typer.Option(help="Default: the same.")] = None,
    decay: Literal["constant", "cosine"] = "constant",
    weight_decay: float = 1e-3,
    clip: Annotated[float, typer.Option(help="Largest norm of the student's gradient.")] = 1.0,
    dropout: float = 0.1,
    position_bias_factor: Annotated[float, typer.Option(help="Learning rate of T5's position bias, times this.")] = 1.0,
    backbone_dtype: Annotated[
        Literal["cache", "bfloat16", "float32"], typer.Option(help="cache: as recorded.")
    ] = "cache",
    checkpoint_every: int = 200,
    seed: int = 0,
    verify: Verify = "once",
    local_copy: Annotated[
        Path | None, typer.Option(help="Folder here for shard files of a cache that lies on an object store.")
    ] = None,
    local_copy_gib: Annotated[float, typer.Option(min=0.001, help="Largest size of it, GiB.")] = 64.0,
    accept_floor: Annotated[bool, typer.Option(help="Train even where the replay floor says: wrong backbone.")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    settings: Settings = None,
) -> None:
    """Train a student by replaying a cache through the frozen transformer. Given again, it goes on.

    Example: understudy train my-run --cache my-cache --student pocket-small --warmup-steps 2000 --steps 300
    """
    from trainer.settings import TrainSettings

    asked = TrainSettings.from_flags(
        student=student, init=init, steps=steps, warmup_steps=warmup_steps, batch_size=batch_size,
        order=order, learning_rate=learning_rate, warmup_learning_rate=warmup_learning_rate, decay=decay,
        weight_decay=weight_decay, clip=clip, dropout=dropout, position_bias_factor=position_bias_factor,
        backbone_dtype=backbone_dtype, checkpoint_every=checkpoint_every, seed=seed,
    )  # fmt: skip
    source = student_source(student)
    from storage_schemas.reader import Cache

    copy_bytes = int(local_copy_gib * 2**30)
    recorded = Cache.open(cache, verify=verify, local_copy=local_copy, local_copy_bytes=copy_bytes)
    torch_device = quiet_device(device)
    from models.teacher_folder import REPLAY_PARTS
    from trainer.train import train as run_train

    # A warm-up alone compares embeddings: it needs no transformer.
    teacher = resolve_teacher(backbone or recorded.manifest.source, REPLAY_PARTS) if steps else None
    progress = terminal(quiet)
    run_train(run, asked, recorded, teacher, torch_device, progress, student_source=source, accept_floor=accept_floor)
    out.print(f"{run}: student trained for {asked.total_steps} steps", markup=False)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
) -> None:
    """Write the best student of a run as a folder that FluxPipeline takes as text_encoder_2.

    Example: understudy export my-run my-student
    """
    quiet_device("cpu")
    from trainer.export import export as run_export

    run_export(run, folder)
    out.print(
        f"{folder}: give it to FluxPipeline.from_pretrained(..., text_encoder_2=...), see its README.md", markup=False
    )
