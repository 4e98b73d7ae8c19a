"""`secondcast train`: phase 2."""

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.resolve import (
    Device,
    Quiet,
    Settings,
    Verify,
    launched_device,
    resolve_context_projection,
    resolve_teacher,
    student_names,
    student_source,
    terminal,
)
from secondcast.commands.train.fitting import Fit, fit_run, is_out_of_memory, out_of_memory, size_bytes, stated_options
from secondcast.storage_schemas.errors import BadSettings
from secondcast.storage_schemas.progress import counted

if TYPE_CHECKING:
    from secondcast.models.teacher.context_projection import ContextProjection
    from secondcast.models.teacher.folder import TeacherFolder
    from secondcast.storage_schemas.formats.local_copy import LocalCopy
    from secondcast.trainer.settings import TrainSettings

LOCAL_COPY_GIB = 64.0


def train(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")],
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]CACHE", help="Folder, or s3://bucket/prefix; several are mixed. NAME: for recipes."
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            autocompletion=student_names, help="T5 folder or hub name, a config alone, an export; pocket-small."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Stages, in place of the flags from --steps to --decay.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="What a recipe's stages with a budget-share share, as in 72h.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Where transformer/ lies here; default: as recorded.")] = None,
    init: Annotated[
        Literal["auto", "pretrained", "random"], typer.Option(help="auto: pretrained where there are weights.")
    ] = "auto",
    steps: Annotated[int, typer.Option(help="Optimizer steps with --loss.")] = 1000,
    warmup_steps: Annotated[int, typer.Option(help="Steps with --warmup-loss before them.")] = 0,
    loss: Annotated[
        Literal["vision", "embedding", "context"],
        typer.Option(
            help="vision: the paper's, replay through the transformer. embedding: its naive distillation. context: "
            "the embedding error after the transformer's text projection; of it only that linear is read."
        ),
    ] = "vision",
    warmup_loss: Annotated[
        Literal["embedding", "context"], typer.Option(help="docs/benchmarks.md compares them.")
    ] = "context",
    huber: Annotated[
        float | None, typer.Option(help="--loss grows as a line, not a square, where a difference is above this.")
    ] = None,
    step_weights: Annotated[
        Literal["uniform", "sigma", "interval"],
        typer.Option(help="Weight of a step in the vision loss: uniform is the paper's; sigma; its distance in sigma."),
    ] = "uniform",
    embedding_term: Annotated[float, typer.Option(help="Weight of the embedding loss beside the vision loss.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Rows of an optimizer step.")] = 32,
    accumulate: Annotated[int, typer.Option(help="Equal parts of the batch, computed one by one: less memory.")] = 1,
    order: Annotated[Literal["shuffled", "following"], typer.Option(help="following: the paper's.")] = "shuffled",
    steps_per_trajectory: Annotated[
        int, typer.Option(help="Rows of the batch that are steps of one trajectory and share the student's forward.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, with --loss.")] = 1e-4,
    warmup_learning_rate: Annotated[float | None, typer.Option(help="Of the warm-up; default: the same.")] = None,
    decay: Annotated[
        Literal["constant", "cosine", "linear"], typer.Option(help="Of the learning rate, over each stage.")
    ] = "constant",
    lr_warmup_steps: Annotated[
        int | None, typer.Option(help="Steps over which it rises; default: 20 where it decays, else none.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-3,
    clip: Annotated[float, typer.Option(help="Largest norm of the student's gradient.")] = 1.0,
    dropout: Annotated[float, typer.Option(help="Of the student, while it trains.")] = 0.1,
    position_bias_factor: Annotated[float, typer.Option(help="Learning rate of T5's position bias, times this.")] = 1.0,
    ema: Annotated[
        float | None, typer.Option(help="Decay of an average of the weights, which is validated and exported.")
    ] = None,
    student_dtype: Annotated[
        Literal["auto", "float32", "bfloat16-autocast"],
        typer.Option(help="Arithmetic of the student (weights stay float32); auto: autocast on a GPU in bfloat16."),
    ] = "auto",
    backbone_dtype: Annotated[
        Literal["cache", "bfloat16", "float32"], typer.Option(help="cache: as recorded.")
    ] = "cache",
    modulation: Annotated[
        Literal["auto", "table", "host", "live"],
        typer.Option(
            help="table: 27 % of FLUX's weights give way to their results; host: they stay in its memory, and it "
            "computes; auto: table wherever pooled is zero, else host where the GPU is small."
        ),
    ] = "auto",
    checkpoint_blocks: Annotated[
        int,
        typer.Option(metavar="N", help="Compute every N-th block of the transformer twice, for less memory; 0: none."),
    ] = 0,
    resident_blocks: Annotated[
        int | None,
        typer.Option(metavar="N", help="Keep N of its blocks on the GPU, stream the others from pinned host memory."),
    ] = None,
    quantize: Annotated[
        Literal["none", "int8", "fp8", "nf4"],
        typer.Option(help="Its blocks' weights in 8 or 4 bits: a biased teacher; the replay floor says how much."),
    ] = "none",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile its blocks, once per shape: faster steps, another rounding.")
    ] = False,
    attention_backend: Annotated[
        str | None, typer.Option(help="diffusers' attention backend for it; default: torch's own.")
    ] = None,
    fit: Fit = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints, each with a validation.")] = 200,
    checkpoint_minutes: Annotated[
        float, typer.Option(help="After so long without a checkpoint there is one, without a validation.")
    ] = 30.0,
    keep: Annotated[int, typer.Option(help="Last checkpoints kept, besides the best.")] = 2,
    floor: Annotated[
        int, typer.Option(help="Records of which the replay floor is measured at the start; 0: none.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Of the order of the records, of dropout and of random weights.")] = 0,
    verify: Verify = "once",
    local_copy: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep shard files of caches on an object store in DIR/secondcast-shards/."),
    ] = None,
    local_copy_gib: Annotated[float, typer.Option(min=0.001, help="Largest size of it, GiB.")] = LOCAL_COPY_GIB,
    log_to: Annotated[
        list[str] | None,
        typer.Option(metavar="PLACE", help="Show the metrics there too: tensorboard, wandb; may be repeated."),
    ] = None,
    accept_floor: Annotated[bool, typer.Option(help="Train even where the replay floor says: wrong backbone.")] = False,
    shard_student: Annotated[
        bool, typer.Option(help="Divide a large student among the processes (FSDP2); each holds a part of it.")
    ] = False,
    device: Device = "auto",
    quiet: Quiet = False,
    settings: Settings = None,
) -> None:
    """Train a student by replaying a cache through the frozen transformer. Given again, it goes on.

    Example: secondcast train my-run --cache my-cache --student pocket-small --warmup-steps 2000 --steps 300

    Started by torchrun, accelerate launch or srun, the processes divide each batch among them, and train what one
    process would.
    """
    flags = dict(
        init=init, steps=steps, warmup_steps=warmup_steps, loss=loss, warmup_loss=warmup_loss,
        huber=huber, step_weights=step_weights, embedding_term=embedding_term, batch_size=batch_size,
        accumulate=accumulate, order=order, steps_per_trajectory=steps_per_trajectory, learning_rate=learning_rate,
        warmup_learning_rate=warmup_learning_rate, decay=decay, lr_warmup_steps=lr_warmup_steps,
        weight_decay=weight_decay, clip=clip, dropout=dropout, position_bias_factor=position_bias_factor, ema=ema,
        student_dtype=student_dtype, backbone_dtype=backbone_dtype, modulation=modulation,
        checkpoint_blocks=checkpoint_blocks, resident_blocks=resident_blocks, quantize=quantize, compile=compile,
        attention_backend=attention_backend, checkpoint_every=checkpoint_every,
        checkpoint_minutes=checkpoint_minutes, keep=keep, floor=floor, seed=seed,
    )  # fmt: skip
    if fit is not None and fit.strip().lower() != "auto":
        # Before anything is opened.
        size_bytes(fit)
    places = named_places(cache or [])
    given = {name: value for name, value in flags.items() if is_given(context, name)}
    if fit is not None and "quantize" in given and "checkpoint_blocks" not in given:
        # Eight bits need it, and it is --fit that chooses.
        flags["checkpoint_blocks"] = 1
    if recipe is not None:
        asked, stated = asked_of_recipe(recipe, student, budget, given)
        places = stated | places
    else:
        asked = asked_of_flags(student, budget, flags)
    if not places:
        raise BadSettings("no cache is given: give --cache, the folder that `secondcast build` made")
    train_run(
        run, asked, places, backbone=backbone, device=device, quiet=quiet, verify=verify, local_copy=local_copy,
        local_copy_gib=local_copy_gib, accept_floor=accept_floor, shard_student=shard_student,
        log_to=log_to or (), fit=fit, held=stated_options(asked, None if recipe is not None else given),
        recipe=recipe is not None,
    )  # fmt: skip


def train_run(
    run: Path,
    asked: "TrainSettings",
    places: Mapping[str, str],
    *,
    backbone: str | None = None,
    device: str = "auto",
    quiet: bool = False,
    verify: Literal["off", "once", "always"] = "once",
    local_copy: Path | None = None,
    local_copy_gib: float = LOCAL_COPY_GIB,
    accept_floor: bool = False,
    shard_student: bool = False,
    log_to: Sequence[str] = (),
    fit: str | None = None,
    held: Collection[str] = (),
    recipe: bool = False,
) -> None:
    """Train as asked on the caches at these places, by name; with the other processes that were launched, if any.

    fit: GPU memory to fit into, by options that are not among those `held`. recipe: whether that is where stages stand.
    """
    from secondcast.cache_builder.share import launched_worker

    launched = launched_worker(None, os.environ)
    from secondcast.trainer.run.metric_mirrors import mirror_names

    mirrors, source = mirror_names(log_to), student_source(asked.student)
    from secondcast.storage_schemas.reader import Cache

    progress = terminal(quiet)
    copies = None if local_copy is None else _local_copy(local_copy, local_copy_gib, progress.say)
    caches = {name: Cache.open(place, verify=verify, local_copy=copies) for name, place in places.items()}
    torch_device = launched_device(device, launched.local_number)
    from secondcast.models.device import total_bytes
    from secondcast.models.teacher.folder import REPLAY_PARTS
    from secondcast.trainer.cost.stage_cost import costs_of
    from secondcast.trainer.distributed.processes import joined
    from secondcast.trainer.train import train as run_train

    manifests = {name: cache.manifest for name, cache in caches.items()}
    recorded = next(iter(manifests.values()))
    name = backbone or recorded.source
    # Where embeddings alone are compared no transformer is needed.
    teacher: TeacherFolder | ContextProjection | None = None
    if asked.teacher_use == "transformer":
        teacher = resolve_teacher(name, REPLAY_PARTS)
    elif asked.teacher_use == "context_embedder":
        teacher = resolve_context_projection(name, recorded.teacher)
    with joined(launched.worker.number, launched.worker.count, torch_device, sharded=shard_student) as processes:
        if launched.by and processes.is_first:
            progress.say(f"{processes.ranks} processes (by {launched.by}) divide each batch")
        gpu_bytes = total_bytes(torch_device)
        make_costs = partial(costs_of, manifests, source, ranks=processes.ranks, gpu_bytes=gpu_bytes)
        if fit is not None:
            asked = fit_run(asked, make_costs, fit=fit, run=run, processes=processes, held=held, say=progress.say)
        try:
            trained = run_train(
                run, asked, caches, teacher, torch_device, progress, student_source=source,
                accept_floor=accept_floor, processes=processes, log_to=mirrors,
            )  # fmt: skip
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(asked, make_costs, run, recipe=recipe) from error
    if processes.is_first:
        print_line(f"{run}: student trained for {counted(trained, 'step')}")


def _local_copy(place: Path, limit_gib: float, say: Callable[[str], None]) -> "LocalCopy":
    if not math.isfinite(limit_gib):
        raise BadSettings(f"--local-copy-gib is {limit_gib}, expected a number of GiB such as {LOCAL_COPY_GIB:g}")
    from secondcast.storage_schemas.formats.local_copy import LocalCopy

    return LocalCopy.open(place, limit_bytes=int(limit_gib * 2**30), say=say)


def asked_of_flags(student: str | None, budget: str | None, flags: dict[str, Any]) -> "TrainSettings":
    """The run that flags ask for: a warm-up, and the stage after it."""
    from secondcast.trainer.settings import TrainFlags

    if student is None:
        raise BadSettings("no student is given: give --student, such as google-t5/t5-base or pocket-small")
    if budget is not None:
        raise BadSettings(f"--budget is {budget} without --recipe: the stages of a recipe share it; give --steps")
    return TrainFlags.from_flags(student=student, **flags).settings()


def is_given(context: typer.Context, name: str) -> bool:
    """Whether a flag stands on the command line or in the file of --settings."""
    # typer carries its own copy of click from 0.29 on: the source of a value is known by its name.
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def asked_of_recipe(
    file: Path, student: str | None, budget: str | None, given: dict[str, Any]
) -> tuple["TrainSettings", dict[str, str]]:
    """The run that a recipe states, and its caches; `given` are the flags beside it, student and budget apart."""
    from secondcast.trainer.recipe import read_recipe, seconds_of
    from secondcast.trainer.settings import TrainSettings

    if stages := [name for name in given if name not in TrainSettings.model_fields]:
        raise BadSettings(
            f"--{stages[0].replace('_', '-')} is given beside --recipe {file}: it is for a stage to say; change the "
            f"recipe, or leave one of them away"
        )
    changed = dict(given)
    if student is not None:
        changed["student"] = student
    if budget is not None:
        changed["budget_seconds"] = seconds_of(budget)
    found = read_recipe(file, **changed)
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
            raise BadSettings(f"--cache {text!r} names no place, expected [NAME=]CACHE, as in --cache {text}FOLDER")
        if name in places:
            raise BadSettings(
                f"two caches are named {name!r}, {places[name]} and {place}: name them, as in --cache {name}-2={place}"
            )
        places[name] = place
    return places
