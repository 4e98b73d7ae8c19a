"""`secondcast.train`, and the run behind it and behind the command of that name."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from secondcast.api.caches import local_copies, open_caches
from secondcast.api.fitting import fit_run, out_of_memory, stated_options
from secondcast.api.names import resolve_context_projection, resolve_teacher, student_source
from secondcast.api.options import display, options_of
from secondcast.api.run_report import RunReport
from secondcast.api.runs import check_no_arguments, named_places, run_of_options, run_of_recipe
from secondcast.api.students import load_student
from secondcast.cache_builder.worker import launched_worker
from secondcast.models.device import is_out_of_memory, launched_device, total_bytes
from secondcast.models.memory.options import GpuMemoryLimit
from secondcast.models.student.folder import best_checkpoint
from secondcast.models.student.prompt_encoder import PromptEncoder
from secondcast.models.teacher.context_projection import ContextProjection
from secondcast.models.teacher.folder import REPLAY_PARTS, TeacherFolder
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.formats.files import Verify
from secondcast.storage_schemas.formats.local_cache import LOCAL_COPY_GIB
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.cost.stage_cost import costs_of
from secondcast.trainer.distributed.processes import init_distributed
from secondcast.trainer.loop import Observer
from secondcast.trainer.losses.vision import LossFunction
from secondcast.trainer.run.metric_mirrors import mirror_names
from secondcast.trainer.run.metrics import read_metrics
from secondcast.trainer.settings import TrainOptions, TrainSettings
from secondcast.trainer.train import train as run_train

Place = str | Path | Cache


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A finished run.

    run: its folder.
    steps: optimizer steps of the whole run, those before it was resumed included.
    is_main_process: whether this process wrote the folder; False in the others of torchrun or srun.
    """

    run: Path
    steps: int
    is_main_process: bool = True

    @property
    def validation_loss(self) -> float | None:
        """The lowest validation loss, of the checkpoint that load_student reads; None without held-out prompts."""
        best = best_checkpoint(self.run)
        return None if best is None else best[1]

    def metrics(self) -> list[dict[str, Any]]:
        """What was logged, in order: entries with `step` and for example `loss` or `validation_loss`."""
        return read_metrics(self.run)

    def load_student(self, device: str = "auto") -> PromptEncoder:
        """The student of the best checkpoint; without validations, of the last one."""
        return load_student(self.run, device=device)


def train(
    run: str | Path,
    cache: Place | Sequence[Place] | Mapping[str, Place] = (),
    *,
    student: str | Path | None = None,
    loss_fn: LossFunction | None = None,
    observers: Sequence[Observer] = (),
    config: str | Path | None = None,
    time_budget: str | None = None,
    backbone: str | Path | None = None,
    verify_checksums: Verify = "once",
    local_cache_dir: str | Path | None = None,
    local_cache_gib: float = LOCAL_COPY_GIB,
    report_to: str | Sequence[str] = (),
    sample_every: int | None = None,
    sample_ids: str | Sequence[str] = (),
    ignore_replay_error: bool = False,
    fsdp: bool = False,
    device: str = "auto",
    progress: bool | Progress = False,
    **options: Any,
) -> TrainedRun:
    """Train a student by replaying caches, as `secondcast train` does; the same call again resumes.

    run: folder of the run.
    cache: a cache or its location, several, or a mapping of names to them; a recipe may state them instead.
    student: folder or hub name of a text encoder, a config file, an export, or pocket-small.
    loss_fn: takes the place of the vision loss: a function of the predictions with the student's embeddings (fp32,
        [B, S, C]) and the batch, whose velocity_BSC are the recorded predictions; it returns the mean over the rows.
    observers: called at the start, after each step and after each checkpoint; see Observer.
    config: a recipe, which states the stages; the options of a stage are then not given.
    progress: True shows progress on stderr.
    options: all others of `secondcast train` by name, such as steps=300; see docs/options.md. The arguments that are
        not explained here are options of that name, too.

    Raises SecondcastError: SettingsError for an unknown or invalid option, RunError for a folder of another run,
    TeacherError, StudentError, NotACacheError, NonFiniteError. KeyboardInterrupt after Ctrl-C, behind a checkpoint.
    """
    of_run, of_memory = options_of("train", options, TrainOptions, GpuMemoryLimit)
    given, memory = TrainOptions.from_flags(**of_run), GpuMemoryLimit.from_flags(**of_memory)
    shown, name = display(progress), None if student is None else str(student)
    places: Mapping[str, str | Cache] = _places(cache)
    if config is not None:
        check_no_arguments(Path(config), signature(train).parameters)
        # --quiet is about the command's lines.
        asked, stated = run_of_recipe(Path(config), name, time_budget, given, beside={"quiet"})
        places = stated | dict(places)
    else:
        asked = run_of_options(name, time_budget, given, max_gpu_memory=memory.max_gpu_memory)
    copies = local_copies(local_cache_dir, local_cache_gib, shown.say)
    return train_run(
        Path(run), asked, open_caches(places, verify_checksums=verify_checksums, copies=copies), shown,
        backbone=None if backbone is None else str(backbone), device=device, fsdp=fsdp, report_to=_listed(report_to),
        ignore_replay_error=ignore_replay_error, sample_every=sample_every, sample_ids=_listed(sample_ids),
        max_gpu_memory=memory.max_gpu_memory, held=stated_options(asked, None if config else given.given),
        recipe=config is not None, loss_fn=loss_fn, observers=observers,
    )  # fmt: skip


def train_run(
    run: Path,
    asked: TrainSettings,
    caches: Mapping[str, Cache],
    progress: Progress,
    *,
    backbone: str | None = None,
    device: str = "auto",
    ignore_replay_error: bool = False,
    fsdp: bool = False,
    report_to: Sequence[str] = (),
    sample_every: int | None = None,
    sample_ids: Sequence[str] = (),
    max_gpu_memory: str | None = None,
    held: Collection[str] = (),
    recipe: bool = False,
    loss_fn: LossFunction | None = None,
    observers: Sequence[Observer] = (),
) -> TrainedRun:
    """Train as asked on these caches, by name; with the other processes that were launched, if any.

    sample_every, sample_ids: see Samples.
    max_gpu_memory: GPU memory to fit into, by options that are not in `held`.
    recipe: whether a recipe states the stages.
    """
    if not caches:
        raise SettingsError("no cache is given: give --cache, the folder that `secondcast build` made")
    if sample_ids and sample_every is None:
        raise SettingsError(f"--sample-ids is {sample_ids[0]} without --sample-every: give --sample-every N, in steps")
    launched = launched_worker(None, os.environ)
    mirrors, source = mirror_names(report_to), student_source(asked.student)
    torch_device = launched_device(device, launched.local_number)
    manifests = {name: cache.manifest for name, cache in caches.items()}
    first = next(iter(manifests.values()))
    teacher = _teacher_of(asked, first, backbone)
    samples = None
    if sample_every is not None:
        from secondcast.api.samples import Samples

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
            steps = run_train(
                run, asked, caches, teacher, torch_device, progress, student_source=source,
                ignore_replay_error=ignore_replay_error, processes=processes, report_to=mirrors, loss_fn=loss_fn,
                observers=[*([] if samples is None else [samples]), RunReport(progress.say), *observers],
            )  # fmt: skip
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(asked, make_costs, run, recipe=recipe) from error
    return TrainedRun(run=run, steps=steps, is_main_process=processes.is_main_process)


def _teacher_of(
    asked: TrainSettings, recorded: Manifest, backbone: str | None
) -> TeacherFolder | ContextProjection | None:
    """What of the teacher the losses need; where embeddings alone are compared, nothing."""
    name = backbone or recorded.source
    if asked.teacher_use == "transformer":
        return resolve_teacher(name, REPLAY_PARTS)
    if asked.teacher_use == "context_embedder":
        return resolve_context_projection(name, recorded.teacher)
    return None


def _listed(given: str | Sequence[str]) -> Sequence[str]:
    return [given] if isinstance(given, str) else given


def _places(cache: Place | Sequence[Place] | Mapping[str, Place]) -> dict[str, str | Cache]:
    """Caches or their locations by name; of a cache without a name, that of its folder."""
    if isinstance(cache, Mapping):
        return {name: one if isinstance(one, Cache) else str(one) for name, one in cache.items()}
    listed = [cache] if isinstance(cache, Place) else list(cache)
    places = named_places([one.location if isinstance(one, Cache) else str(one) for one in listed])
    named = zip(places.items(), listed, strict=True)
    return {name: one if isinstance(one, Cache) else place for (name, place), one in named}
