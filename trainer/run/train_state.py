"""What a run trains and its checkpoints hold: the student, the EMA of its weights, and the optimizer."""

from collections.abc import Mapping

import torch

from secondcast.models.student.student import Student
from secondcast.trainer.distributed.processes import SINGLE_PROCESS, Distributed
from secondcast.trainer.distributed.sharding import full_norm, full_student_of, full_tensors, load_tensors
from secondcast.trainer.optimizer import EMA, make_optimizer, optimizer_tensors, restore_optimizer
from secondcast.trainer.settings import TrainSettings


class TrainState:
    """The student in training, its EMA if the settings have an ema_decay, and AdamW; placed on a device, or sharded.

    student: is moved, not copied.
    """

    def __init__(
        self,
        student: Student,
        settings: TrainSettings,
        device: torch.device,
        processes: Distributed = SINGLE_PROCESS,
    ) -> None:
        self.processes, self._settings = processes, settings
        self._full_student = full_student_of(student) if processes.sharded and processes.is_main_process else None
        self.average = EMA(student, settings.ema_decay) if settings.ema_decay is not None else None
        self.student = processes.placed(student, device)
        if self.average is not None:
            self.average.student = processes.placed(self.average.student, device)
        self.parallel_student = processes.synchronized(self.student)
        self.optimizer = make_optimizer(self.student, settings)

    @property
    def eval_student(self) -> Student:
        """The student that is validated and exported: the average where there is one."""
        return self.student if self.average is None else self.average.student

    @property
    def plain_student(self) -> Student:
        """A student whose class and configuration are those of an undivided one; in the first process."""
        return self.student if self._full_student is None else self._full_student

    def reset_optimizer(self) -> None:
        """Begin with new moments."""
        self.optimizer = make_optimizer(self.student, self._settings)

    def update(self, step: int) -> torch.Tensor:
        """Optimizer step `step` with the gradients at hand; their norm before clipping, over all processes."""
        norm = full_norm(torch.nn.utils.clip_grad_norm_(self.student.parameters(), self._settings.max_grad_norm))
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.student, step)
        return norm

    def full_eval_student(self) -> Student:
        """The eval_student, unsharded in the first process; all processes call it."""
        student = self.eval_student
        if not self.processes.sharded:
            return student
        tensors = full_tensors(student.named_parameters(), keep=self.processes.is_main_process)
        if self._full_student is None:
            return student
        self._full_student.load_state_dict(tensors, strict=False)
        return self._full_student

    def full_optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The moments of the optimizer, unsharded in the first process; all processes call it."""
        return full_tensors(optimizer_tensors(self.student, self.optimizer), keep=self.processes.is_main_process)

    def full_trained_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters in training, unsharded in the first process; all processes call it."""
        return full_tensors(self.student.named_parameters(), keep=self.processes.is_main_process)

    def restore(
        self,
        *,
        evaluated: Mapping[str, torch.Tensor],
        trained: Mapping[str, torch.Tensor],
        moments: Mapping[str, torch.Tensor],
    ) -> None:
        """Load unsharded tensors: of the student that is validated, of the one in training, and of the optimizer."""
        if self.average is not None:
            load_tensors(self.average.student, evaluated, strict=True)
        # With an EMA a tied tensor is saved under one of its two names.
        load_tensors(self.student, trained, strict=self.average is None)
        restore_optimizer(self.student, self.optimizer, moments)
