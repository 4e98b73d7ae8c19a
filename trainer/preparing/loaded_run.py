"""What a run has in memory before its folder is opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from secondcast.models.device import deterministic_algorithms
from secondcast.models.student.negative import keep_negative
from secondcast.models.student.student import Student, new_student
from secondcast.models.student.tokens import StudentTokens
from secondcast.models.teacher.context_projection import ContextProjection
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.distributed.processes import Distributed
from secondcast.trainer.loop import Observer, Trainer
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.losses.vision import LossFunction
from secondcast.trainer.preparing.loading import check_pieces, load_objective, load_own_tokens, uses_autocast
from secondcast.trainer.preparing.stream_variances import stream_variances
from secondcast.trainer.run.beginning import find_begun, run_config
from secondcast.trainer.run.config import RunConfig
from secondcast.trainer.run.metrics import Metrics
from secondcast.trainer.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """The student, the caches and the losses of a run.

    config: what config.json states of the run; the steps may still be shares of a time budget.
    begun: the config of the run that is resumed; None for a new run.
    tokens: of a student that does not read the caches' token ids.
    """

    config: RunConfig
    begun: RunConfig | None
    training_caches: Sequence[TrainingCache]
    objective: Objective
    student: Student
    tokens: StudentTokens | None
    device: torch.device
    processes: Distributed

    def trainer(
        self,
        run: Path,
        settings: TrainSettings,
        student: Student,
        *,
        metrics: Metrics | None = None,
        observers: Sequence[Observer] = (),
    ) -> Trainer:
        """A trainer of a student in the folder `run`; settings: those of the run but for the steps of its stages."""
        return Trainer(
            run,
            settings,
            self.training_caches,
            replace(self.objective, settings=settings),
            student,
            self.device,
            autocast=uses_autocast(settings, self.training_caches[0].cache.manifest, self.device),
            tokens=self.tokens,
            processes=self.processes,
            metrics=metrics,
            observers=observers,
        )


def load_run(
    run: Path,
    settings: TrainSettings,
    caches: Mapping[str, Cache],
    teacher: TeacherFolder | ContextProjection | None,
    device: torch.device,
    progress: Progress,
    *,
    student_source: str,
    loss_fn: LossFunction | None,
    processes: Distributed,
) -> LoadedRun:
    """Load a run that was checked; see `train` for the arguments. RunError for the folder of another run."""
    recorded = next(iter(caches.values())).manifest.teacher
    student = new_student(
        student_source, recorded, init=settings.init, dropout=settings.dropout, seed=settings.seed,
        projection_rank=settings.projection_rank,
    )  # fmt: skip
    tokens = load_own_tokens(settings, student_source, student)
    keep_negative(student, caches.values(), tokens)
    config = run_config(settings, caches, teacher)
    begun = find_begun(run, config, processes)
    if begun is None:
        check_pieces(settings, student_source, tokens, next(iter(caches.values())))
    training_caches = TrainingCache.of_run(caches, begun or config, run)
    with deterministic_algorithms(settings.deterministic):
        objective = load_objective(settings, training_caches, teacher, device, ranks=processes.ranks)
        variances = stream_variances(objective, training_caches, begun, device, processes, progress)
    return LoadedRun(
        config=config.model_copy(update={"stream_variances": variances}),
        begun=begun,
        training_caches=training_caches,
        objective=replace(objective, stream_variances={one.blocks: one for one in variances}, loss_fn=loss_fn),
        student=student,
        tokens=tokens,
        device=device,
        processes=processes,
    )
