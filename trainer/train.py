"""Phase 2: caches -> replay through the frozen backbone -> student -> checkpoints."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from secondcast.models.device import deterministic_algorithms
from secondcast.models.student.negative import keep_negative
from secondcast.models.student.student import Student, new_student
from secondcast.models.teacher.context_projection import ContextProjection
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.progress import Progress, Silent, counted
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.cost.budget import with_steps
from secondcast.trainer.cost.summary import summarized
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.distributed.processes import SINGLE_PROCESS, Distributed
from secondcast.trainer.loop import Observer, Trainer
from secondcast.trainer.losses.vision import LossFunction, function_name
from secondcast.trainer.preparing.checks import attention_notes, check_caches, check_loss_fn
from secondcast.trainer.preparing.loading import load_objective, load_own_tokens, uses_autocast
from secondcast.trainer.preparing.replay_check import check_replay
from secondcast.trainer.preparing.run_report import report_run
from secondcast.trainer.preparing.stream_variances import stream_variances
from secondcast.trainer.run.beginning import find_begun, opened_run, run_config
from secondcast.trainer.run.metric_mirrors import MirrorName
from secondcast.trainer.run.metrics import Metrics
from secondcast.trainer.settings import TrainSettings


def train(
    run: Path,
    settings: TrainSettings,
    caches: Mapping[str, Cache],
    teacher: TeacherFolder | ContextProjection | None,
    device: torch.device,
    progress: Progress,
    *,
    student_source: str,
    ignore_replay_error: bool = False,
    processes: Distributed = SINGLE_PROCESS,
    report_to: Sequence[MirrorName] = (),
    observers: Sequence[Observer] = (),
    loss_fn: LossFunction | None = None,
) -> int:
    """Distill a student from caches, or resume it; the number of optimizer steps of the finished run.

    caches: by the names that stages give them; the tokenizer of one goes with the student.
    teacher: folder with the transformer, of which a run may load the first blocks, or its text projection; None where
        settings.teacher_use is "none".
    student_source: folder of settings.student.
    processes: all call this with the same arguments but for the device; the first one writes and prints.
    report_to: where metrics are shown besides RUN/metrics.jsonl.
    observers: called at the start, after each step and after each checkpoint; see Observer.
    loss_fn: takes the place of the vision loss; a run is resumed with a function of the same name alone.
    """
    check_loss_fn(settings, loss_fn)
    settings = settings.model_copy(update={"loss_fn": None if loss_fn is None else function_name(loss_fn)})
    progress = progress if processes.is_main_process else Silent()
    metrics = Metrics(run, mirrors=report_to, say=progress.say) if processes.is_main_process else None
    # Positions count the rows of one cache behind those of another: the flags may come in any order. Text caches are
    # last, so that a source with trajectories has its number among the backbones too.
    caches = dict(sorted(caches.items(), key=lambda item: (item[1].manifest.is_text, item[0])))
    check_caches(settings, caches, processes.ranks)
    recorded = next(iter(caches.values())).manifest.teacher
    student = new_student(
        student_source, recorded, init=settings.init, dropout=settings.dropout, seed=settings.seed,
        projection_rank=settings.projection_rank,
    )  # fmt: skip
    tokens = load_own_tokens(settings, student_source, student)
    keep_negative(student, caches.values(), tokens)
    config = run_config(settings, caches, teacher)
    begun = find_begun(run, config, processes)
    training_caches = TrainingCache.of_run(caches, begun or config, run)
    with deterministic_algorithms(settings.deterministic):
        objective = load_objective(settings, training_caches, teacher, device, ranks=processes.ranks)
        variances = stream_variances(objective, training_caches, begun, device, processes, progress)
    objective = replace(objective, stream_variances={one.blocks: one for one in variances}, loss_fn=loss_fn)
    config = config.model_copy(update={"stream_variances": variances})
    for line in attention_notes(settings, training_caches) if objective.backbones else ():
        progress.say(line)
    if settings.deterministic and objective.backbones:
        with deterministic_algorithms():
            progress.say(f"deterministic kernels; that of attention is {objective.backbones[0].attention_kernel}")

    def trainer_of(folder: Path, settings: TrainSettings, student: Student, metrics: Metrics | None = None) -> Trainer:
        return Trainer(
            folder,
            settings,
            training_caches,
            replace(objective, settings=settings),
            student,
            device,
            autocast=uses_autocast(settings, training_caches[0].cache.manifest, device),
            tokens=tokens,
            processes=processes,
            metrics=metrics,
            observers=observers,
        )

    def budgeted() -> TrainSettings:
        # The steps that are timed move a copy of the student.
        return with_steps(
            settings, lambda folder, probe: trainer_of(folder, probe, copy.deepcopy(student)), processes, progress
        )

    with (
        deterministic_algorithms(settings.deterministic),
        opened_run(run, config, begun, processes, budgeted) as final,
        metrics or nullcontext(),
    ):
        trainer = trainer_of(run, final, student, metrics)
        trainer.resume(progress)
        report_run(trainer, training_caches, progress)
        if trainer.done == final.total_steps:
            progress.say(f"{counted(trainer.done, 'step')} are already done: nothing is left to do")
        else:
            check_replay(trainer, training_caches, progress, ignore_replay_error=ignore_replay_error)
        with summarized(trainer, training_caches, metrics, progress):
            best = trainer.train(progress)
        if best is not None:
            progress.say(f"lowest validation loss {best:.4g}, of the checkpoint named in best.json")
    return final.total_steps
