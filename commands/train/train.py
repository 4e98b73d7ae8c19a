"""`secondcast train`: phase 2."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.api.fitting import stated_options
from secondcast.api.names import student_source
from secondcast.api.runs import named_places, run_of_options, run_of_recipe
from secondcast.commands.shell.config_file import Config, has_stages
from secondcast.commands.shell.console import print_line, print_lines
from secondcast.commands.shell.resolve import Device, Quiet, Verify, student_names, terminal
from secondcast.commands.train.next_steps import next_lines
from secondcast.models.memory.options import GpuMemoryLimit
from secondcast.storage_schemas.formats.files import Verify as ChecksumTimes
from secondcast.storage_schemas.formats.local_cache import LOCAL_COPY_GIB
from secondcast.storage_schemas.progress import counted
from secondcast.trainer.settings import TrainOptions

if TYPE_CHECKING:
    from secondcast.trainer.settings import TrainSettings

Budget = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Time, such as 72h, shared by the recipe's stages that have a budget-share."),
]


def train(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]CACHE",
            help="Cache to train on: a folder or s3://bucket/prefix. Several are mixed; recipes refer to NAME.",
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            autocompletion=student_names,
            help="Student: folder or hub name of a text encoder, a config file, an export, or pocket-small.",
        ),
    ] = None,
    time_budget: Budget = None,
    backbone: Annotated[str | None, typer.Option(help="Location of transformer/. Default: as recorded.")] = None,
    options: TrainOptions = TrainOptions(),
    memory: GpuMemoryLimit = GpuMemoryLimit(),
    verify_checksums: Verify = "once",
    local_cache_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep shard files from an object store in DIR/secondcast-shards/."),
    ] = None,
    local_cache_gib: Annotated[
        float, typer.Option(min=0.001, help="Maximum size of --local-cache-dir in GiB.")
    ] = LOCAL_COPY_GIB,
    report_to: Annotated[
        list[str] | None,
        typer.Option(metavar="PLACE", help="Also log metrics and samples to tensorboard or wandb; may be repeated."),
    ] = None,
    sample_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Sample recorded trajectories with the student every N steps."),
    ] = None,
    sample_ids: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]KEY",
            help="Trajectory to sample, by key or index, of the cache NAME; may be repeated. Default: 4 held-out ones.",
        ),
    ] = None,
    ignore_replay_error: Annotated[
        bool, typer.Option(help="Train even if the replay error indicates a wrong backbone.")
    ] = False,
    fsdp: Annotated[bool, typer.Option(help="Shard a large student across the processes (FSDP2).")] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Train a student by replaying a cache through the frozen transformer. Run the same command again to resume.

    Example: secondcast train my-run --cache my-cache --student pocket-small --pretrain-steps 2000 --steps 300

    With torchrun, accelerate launch or srun, the processes split each batch; the result is that of one process,
    up to rounding.
    """
    places = named_places(cache or [])
    recipe = config if has_stages(config) else None
    if recipe is not None:
        asked, stated = asked_of_recipe(recipe, student, time_budget, options)
        places = stated | places
    else:
        asked = run_of_options(student, time_budget, options, max_gpu_memory=memory.max_gpu_memory)
    closing = train_run(
        run, asked, places, backbone=backbone, device=device, quiet=quiet, verify_checksums=verify_checksums,
        local_cache_dir=local_cache_dir, local_cache_gib=local_cache_gib, ignore_replay_error=ignore_replay_error,
        fsdp=fsdp, report_to=report_to or (), sample_every=sample_every, sample_ids=sample_ids or (),
        max_gpu_memory=memory.max_gpu_memory,
        held=stated_options(asked, None if recipe is not None else options.given), recipe=recipe is not None,
    )  # fmt: skip
    if not quiet:
        print_lines(closing)


def train_run(
    run: Path,
    asked: "TrainSettings",
    places: Mapping[str, str],
    *,
    quiet: bool = False,
    verify_checksums: ChecksumTimes = "once",
    local_cache_dir: Path | None = None,
    local_cache_gib: float = LOCAL_COPY_GIB,
    backbone: str | None = None,
    **options: Any,
) -> list[str]:
    """Train as asked on the caches at these places, by name; with the other processes that were launched, if any.

    options: see api.training.train_run.

    Returns lines about what to do next; none in processes other than the first one.
    """
    from secondcast.api.caches import local_copies, open_caches

    progress = terminal(quiet)
    copies = local_copies(local_cache_dir, local_cache_gib, progress.say)
    # A wrong name is refused before any cache is opened.
    student_source(asked.student)
    caches = open_caches(places, verify_checksums=verify_checksums, copies=copies)
    from secondcast.api.training import train_run as run_training

    trained = run_training(run, asked, caches, progress, backbone=backbone, **options)
    if not trained.is_main_process:
        return []
    print_line(f"{run}: student trained for {counted(trained.steps, 'step')}")
    return next_lines(run, caches, backbone=backbone)


def asked_of_recipe(
    file: Path, student: str | None, time_budget: str | None, options: TrainOptions
) -> tuple["TrainSettings", dict[str, str]]:
    """The run that a recipe states, and its caches; `options` are given beside it."""
    beside = {*inspect.signature(train).parameters, *GpuMemoryLimit.model_fields}
    return run_of_recipe(file, student, time_budget, options, beside=beside)
