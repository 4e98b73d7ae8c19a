"""`understudy train`: phase 2."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from commands.resolve import (
    Device,
    Quiet,
    Settings,
    Verify,
    out,
    quiet_device,
    resolve_teacher,
    student_source,
    terminal,
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
