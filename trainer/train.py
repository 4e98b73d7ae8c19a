"""Phase 2: caches -> replay through the frozen backbone -> student -> checkpoints."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from secondcast.models.device import deterministic_algorithms
from secondcast.models.teacher.context_projection import ContextProjection
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.progress import Progress, Silent, counted
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.cost.budget import with_steps
from secondcast.trainer.cost.summary import summarized
from secondcast.trainer.distributed.processes import SINGLE_PROCESS, Distributed
from secondcast.trainer.loop import Observer, Trainer
from secondcast.trainer.losses.vision import LossFunction, function_name
from secondcast.trainer.preparing.checks import check_caches, check_loss_fn
from secondcast.trainer.preparing.loaded_run import load_run
from secondcast.trainer.preparing.replay_check import check_replay
from secondcast.trainer.preparing.run_report import report_kernels, report_run
from secondcast.trainer.run.beginning import opened_run
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
    loaded = load_run(
        run, settings, caches, teacher, device, progress, student_source=student_source, loss_fn=loss_fn,
        processes=processes,
    )  # fmt: skip
    report_kernels(loaded.objective, loaded.training_caches, progress)

    def probe(folder: Path, settings: TrainSettings) -> Trainer:
        # Its steps move a copy of the student.
        return loaded.trainer(folder, settings, copy.deepcopy(loaded.student))

    with (
        deterministic_algorithms(settings.deterministic),
        opened_run(
            run, loaded.config, loaded.begun, processes, lambda: with_steps(settings, probe, processes, progress)
        ) as final,
        metrics or nullcontext(),
    ):
        trainer = loaded.trainer(run, final, loaded.student, metrics=metrics, observers=observers)
        trainer.resume(progress)
        report_run(trainer, loaded.training_caches, progress)
        if trainer.done == final.total_steps:
            progress.say(f"{counted(trainer.done, 'step')} are already done: nothing is left to do")
        else:
            check_replay(trainer, loaded.training_caches, progress, ignore_replay_error=ignore_replay_error)
        with summarized(trainer, loaded.training_caches, metrics, progress):
            best = trainer.train(progress)
        if best is not None:
            progress.say(f"lowest validation loss {best:.4g}, of the checkpoint named in best.json")
    return final.total_steps
