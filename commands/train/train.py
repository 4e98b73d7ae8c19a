"""`secondcast train`: phase 2."""

import inspect
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secondcast.commands.shell.config_file import Config, has_stages
from secondcast.commands.shell.console import print_line, print_lines
from secondcast.commands.shell.resolve import (
    Device,
    Quiet,
    Verify,
    launched_device,
    resolve_context_projection,
    resolve_teacher,
    student_names,
    student_source,
    terminal,
)
from secondcast.commands.train.fitting import fit_run, out_of_memory, stated_options
from secondcast.commands.train.next_steps import next_lines
from secondcast.models.memory.options import GpuMemoryLimit
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.formats.files import Verify as ChecksumTimes
from secondcast.storage_schemas.progress import counted
from secondcast.trainer.settings import TrainFlags, TrainOptions, TrainSettings

if TYPE_CHECKING:
    from secondcast.models.teacher.context_projection import ContextProjection
    from secondcast.models.teacher.folder import TeacherFolder
    from secondcast.storage_schemas.formats.local_cache import LocalCache
    from secondcast.storage_schemas.schema.manifest import Manifest
    from secondcast.trainer.settings import TrainSettings

LOCAL_COPY_GIB = 64.0

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

    With torchrun, accelerate launch or srun, the processes split each batch; the result is that of one process.
    """
    places = named_places(cache or [])
    recipe = config if has_stages(config) else None
    if recipe is not None:
        asked, stated = asked_of_recipe(recipe, student, time_budget, options)
        places = stated | places
    else:
        asked = asked_of_flags(student, time_budget, options, max_gpu_memory=memory.max_gpu_memory)
    if not places:
        raise SettingsError("no cache is given: give --cache, the folder that `secondcast build` made")
    if sample_ids and sample_every is None:
        raise SettingsError(f"--sample-ids is {sample_ids[0]} without --sample-every: give --sample-every N, in steps")
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
    backbone: str | None = None,
    device: str = "auto",
    quiet: bool = False,
    verify_checksums: ChecksumTimes = "once",
    local_cache_dir: Path | None = None,
    local_cache_gib: float = LOCAL_COPY_GIB,
    ignore_replay_error: bool = False,
    fsdp: bool = False,
    report_to: Sequence[str] = (),
    sample_every: int | None = None,
    sample_ids: Sequence[str] = (),
    max_gpu_memory: str | None = None,
    held: Collection[str] = (),
    recipe: bool = False,
) -> list[str]:
    """Train as asked on the caches at these places, by name; with the other processes that were launched, if any.

    Returns lines about what to do next; none in processes other than the first one.

    sample_every, sample_ids: see Samples.
    max_gpu_memory: GPU memory to fit into, by options that are not in `held`.
    recipe: whether a recipe states the stages.
    """
    from secondcast.cache_builder.worker import launched_worker

    launched = launched_worker(None, os.environ)
    from secondcast.trainer.run.metric_mirrors import mirror_names

    mirrors, source = mirror_names(report_to), student_source(asked.student)
    from secondcast.storage_schemas.reader import Cache

    progress = terminal(quiet)
    copies = None if local_cache_dir is None else _local_copy(local_cache_dir, local_cache_gib, progress.say)
    caches = {name: Cache.open(place, verify=verify_checksums, local_cache=copies) for name, place in places.items()}
    torch_device = launched_device(device, launched.local_number)
    from secondcast.models.device import is_out_of_memory, total_bytes
    from secondcast.trainer.cost.stage_cost import costs_of
    from secondcast.trainer.distributed.processes import init_distributed
    from secondcast.trainer.train import train as run_train

    manifests = {name: cache.manifest for name, cache in caches.items()}
    first = next(iter(manifests.values()))
    teacher = _teacher_of(asked, first, backbone)
    from secondcast.commands.train.run_report import RunReport

    samples = None
    if sample_every is not None:
        from secondcast.commands.train.samples import Samples

        samples = Samples.open(sample_every, sample_ids, asked, caches, backbone or first.source, progress.say)
    with init_distributed(launched.worker.number, launched.worker.count, torch_device, sharded=fsdp) as processes:
        if launched.by and processes.is_main_process:
            progress.say(f"{processes.ranks} processes (by {launched.by}) divide each batch")
        gpu_bytes = total_bytes(torch_device)
        make_costs = partial(
            costs_of, manifests, source, projection_rank=asked.projection_rank, ranks=processes.ranks,
            gpu_bytes=gpu_bytes,
        )  # fmt: skip
        if max_gpu_memory is not None:
            asked = fit_run(
                asked, make_costs, max_gpu_memory=max_gpu_memory, run=run, processes=processes, held=held,
                say=progress.say, decoding_bytes=0 if samples is None else samples.decoding_bytes(caches),
            )  # fmt: skip
        try:
            trained = run_train(
                run, asked, caches, teacher, torch_device, progress, student_source=source,
                ignore_replay_error=ignore_replay_error, processes=processes, report_to=mirrors,
                observers=[*([] if samples is None else [samples]), RunReport(progress.say)],
            )  # fmt: skip
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(asked, make_costs, run, recipe=recipe) from error
    if not processes.is_main_process:
        return []
    print_line(f"{run}: student trained for {counted(trained, 'step')}")
    return next_lines(run, caches, backbone=backbone)


def _teacher_of(
    asked: "TrainSettings", recorded: "Manifest", backbone: str | None
) -> "TeacherFolder | ContextProjection | None":
    """What of the teacher the losses need; where embeddings alone are compared, nothing."""
    from secondcast.models.teacher.folder import REPLAY_PARTS

    name = backbone or recorded.source
    if asked.teacher_use == "transformer":
        return resolve_teacher(name, REPLAY_PARTS)
    if asked.teacher_use == "context_embedder":
        return resolve_context_projection(name, recorded.teacher)
    return None


def _local_copy(place: Path, limit_gib: float, say: Callable[[str], None]) -> "LocalCache":
    if not math.isfinite(limit_gib):
        raise SettingsError(f"--local-cache-gib is {limit_gib}, expected a number of GiB such as {LOCAL_COPY_GIB:g}")
    from secondcast.storage_schemas.formats.local_cache import LocalCache

    return LocalCache.open(place, limit_bytes=int(limit_gib * 2**30), say=say)


def asked_of_flags(
    student: str | None, time_budget: str | None, options: TrainOptions, *, max_gpu_memory: str | None
) -> "TrainSettings":
    """The run that options ask for: a warm-up, and the stage after it."""
    if student is None:
        raise SettingsError(
            "no student is given: give --student, such as google-t5/t5-base or pocket-small, or "
            "for FLUX.2-klein Qwen/Qwen3-0.6B"
        )
    if time_budget is not None:
        raise SettingsError(f"--time-budget is {time_budget} without a recipe, whose stages share it; give --steps")
    given = options.given
    if max_gpu_memory is not None and "quantize" in given:
        # Eight bits need it, and it is --max-gpu-memory that chooses.
        given = {"activation_checkpointing": 1} | given
    return TrainFlags.from_flags(student=student, **given).settings()


def asked_of_recipe(
    file: Path, student: str | None, time_budget: str | None, options: TrainOptions
) -> tuple["TrainSettings", dict[str, str]]:
    """The run that a recipe states, and its caches; `options` are given beside it."""
    from secondcast.trainer.recipe import read_recipe, seconds_of

    given = options.given
    if stages := [name for name in given if name not in TrainSettings.model_fields]:
        raise SettingsError(
            f"--{stages[0].replace('_', '-')} is given beside --config {file}: it is an option of a stage; change the "
            f"recipe, or leave one of them out"
        )
    changed = dict(given)
    if student is not None:
        changed["student"] = student
    if time_budget is not None:
        changed["time_budget_seconds"] = seconds_of(time_budget)
    found = read_recipe(
        file, beside=set(inspect.signature(train).parameters) | set(GpuMemoryLimit.model_fields), **changed
    )
    return found.settings, found.caches


def named_places(given: Sequence[str]) -> dict[str, str]:
    """Caches by name, from --cache [NAME=]CACHE; a cache without a name is named as its folder is."""
    places: dict[str, str] = {}
    for text in given:
        name, sign, place = text.partition("=")
        # A folder may have a sign of equality in its name, a name has no slash.
        if not sign or not name or "/" in name or Path(text).exists():
            place = text
            name = Path(text).resolve().name if "://" not in text else text.rstrip("/").rsplit("/", 1)[-1]
        if not place:
            raise SettingsError(f"--cache {text!r} names no place, expected [NAME=]CACHE, as in --cache {text}FOLDER")
        if name in places:
            raise SettingsError(
                f"two caches are named {name!r}, {places[name]} and {place}: name them, as in --cache {name}-2={place}"
            )
        places[name] = place
    return places
