"""The loop of a run: batch, loss, optimizer step, checkpoint. What it computes is a function of the step number."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from secondcast.models.student.student import Student
from secondcast.models.student.tokens import StudentTokens
from secondcast.storage_schemas.errors import NonFiniteError
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.trainer.data.batch_plan import BatchPlan
from secondcast.trainer.data.mixture import TrainingCache, split
from secondcast.trainer.data.replay_dataset import Batch, EmbeddingBatch, Key, Rows
from secondcast.trainer.data.sampler import mix
from secondcast.trainer.distributed.processes import SINGLE_PROCESS, Distributed
from secondcast.trainer.dropout import BatchInvariantDropout
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.losses.validation import ReplayError, measure_replay_error, measured_sources, validation_loss
from secondcast.trainer.optimizer import set_learning_rate
from secondcast.trainer.run.checkpoints.best import delete_old_checkpoints, mark_best, restore_best, validation_text
from secondcast.trainer.run.checkpoints.loading import load_checkpoint
from secondcast.trainer.run.checkpoints.saving import save_checkpoint
from secondcast.trainer.run.metrics import Metrics
from secondcast.trainer.run.stopping import CheckpointTimer
from secondcast.trainer.run.timing import StepClock
from secondcast.trainer.run.train_state import TrainState
from secondcast.trainer.settings import StepOfStage, TrainSettings
from secondcast.trainer.stage import Stage

_Batches = Iterator[Batch | EmbeddingBatch]
# As many records of a batch are named in an error; metrics.jsonl has them all.
_NAMED = 4


@dataclass(frozen=True, kw_only=True)
class TimedStep:
    """An optimizer step: its loss, and its seconds with the wait for the batch."""

    loss: float
    seconds: float


class Observer:
    """Observes a run while it trains; what a method raises stops the run."""

    def on_start(self, trainer: "Trainer") -> None:
        """Called in every process before the first step, also of a resumed run."""

    def on_step(self, trainer: "Trainer") -> None:
        """Called in every process after each step, before its checkpoint."""

    def on_checkpoint(self, run: Path, step: int) -> None:
        """Called in the first process when checkpoint-`step` is complete."""


class Trainer:
    """One run: the student, its optimizer, the dataset and what it minimises.

    autocast: the student (never the backbone) computes in bf16; its parameters stay fp32. tokens: of a student that
    does not read the caches'. metrics: where losses go; those of all processes go to the first one's.
    """

    def __init__(
        self,
        run: Path,
        settings: TrainSettings,
        training_caches: Sequence[TrainingCache],
        objective: Objective,
        student: Student,
        device: torch.device,
        *,
        autocast: bool,
        tokens: StudentTokens | None = None,
        processes: Distributed = SINGLE_PROCESS,
        metrics: Metrics | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.run, self.settings, self.objective, self.device = run, settings, objective, device
        self.processes, self.metrics, self.autocast = processes, metrics, autocast
        self.dataset, self.held_out = split(training_caches, device, tokens, objective.host_modulation)
        self.plan = BatchPlan(settings, training_caches, self.dataset, rank=processes.rank, ranks=processes.ranks)
        self.train_state = TrainState(student, settings, device, processes)
        self.clock = StepClock.of(device)
        self.done = 0
        self.best: float | None = None
        self.replay_error: ReplayError | None = None
        self._observers = observers
        self._pauses = CheckpointTimer(processes, minutes=settings.checkpoint_minutes)
        self._tokenizer = training_caches[0].cache.tokenizer_files if tokens is None else tokens.files

    @property
    def student(self) -> Student:
        """The student in training."""
        return self.train_state.student

    def train(self, progress: Progress) -> float | None:
        """Train to the last step, from the current one (see resume); return the best validation loss.

        KeyboardInterrupt after Ctrl-C or SIGTERM to any of the processes, behind a checkpoint of the step in hand.
        """
        steps = range(self.done, self.settings.total_steps)
        if not steps:
            return self.best
        with self.clock.beside():
            for observer in self._observers:
                observer.on_start(self)
        with self._pauses.listening(progress.say), self._batches(steps) as batches:
            for number, end in enumerate(self.settings.ends):
                if self.done < end and self._train_stage(number, batches, progress):
                    break
        if self._pauses.wish.stop:
            raise KeyboardInterrupt
        return self.best

    def _train_stage(self, number: int, batches: _Batches, progress: Progress) -> bool:
        """The steps that are left of a stage; whether a stop was asked for meanwhile."""
        stage, end = self.settings.stages[number], self.settings.ends[number]
        # A bar for each: the time that is left is guessed from steps of one kind.
        title = "train" if len(self.settings.stages) == 1 else f"train {stage.name}"
        done = self.done - (end - stage.length)
        with progress.bar(title, total=stage.length, done=done, unit="steps") as bar:
            for step in range(self.done, end):
                loss = self._optimizer_step(self.settings.at(step), batches)
                bar.advance(1, self._note(stage, loss))
                self.done = step + 1
                with self.clock.beside():
                    for observer in self._observers:
                        observer.on_step(self)
                due = self.settings.is_checkpoint(self.done)
                # Once: it may be asked at any moment.
                wish = self._pauses.wish
                if due or wish.keep:
                    with self.clock.beside():
                        self._checkpoint(progress, validate=due)
                    self._pauses.kept()
                if wish.stop:
                    return True
        return False

    def timed_steps(self) -> list[TimedStep]:
        """Take all steps without a checkpoint."""
        taken = []
        steps = range(self.settings.total_steps)
        with self._batches(steps) as batches:
            for step in steps:
                began = time.monotonic()
                loss = self._optimizer_step(self.settings.at(step), batches)
                taken.append(TimedStep(loss=loss, seconds=time.monotonic() - began))
        return taken

    def _batches(self, steps: range) -> AbstractContextManager[_Batches]:
        return self.dataset.prefetch(request for step in steps for request in self.plan.requests(step))

    def embed(self, student: torch.nn.Module, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """encoder_hidden_states_BTD of the student, in the run's arithmetic."""
        # bf16 autocast around the student alone: around the backbone it would change the target's arithmetic.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            embedding_BTD: torch.Tensor = student(token_ids_BT)[0]
            return embedding_BTD

    @torch.no_grad()
    def embeddings(self, prompts: Sequence[Key]) -> torch.Tensor:
        """encoder_hidden_states_BTD of prompts by the student that is validated; called by all processes."""
        return self.embed(self.train_state.eval_student.eval(), self.dataset.token_ids(prompts))

    def validate(self, done: int) -> float:
        """Loss on held-out trajectories, at steps spread evenly: see validation_loss."""
        student = self.train_state.eval_student.eval()
        errors = validation_loss(
            self.objective,
            self.held_out,
            lambda token_ids_BT: self.embed(student, token_ids_BT),
            rows=self.settings.validate_rows,
            processes=self.processes,
        )
        if not math.isfinite(errors.mean):
            # A run would resume from a checkpoint of such a student.
            self._log(step=done, stopped=f"validation loss is {errors.mean}")
            raise NonFiniteError(
                f"validation loss is {errors.mean} after {counted(done, 'step')}: stopped, the last checkpoint is "
                f"intact; lower --learning-rate and run it again with a new run folder"
            )
        by_step = {"validation_loss_by_step": errors.means_by_step} if self.objective.predicts else {}
        self._log(step=done, validation_loss=errors.mean, **by_step)
        return errors.mean

    def measure_replay_error(self, sources: Sequence[int] | None = None) -> ReplayError:
        """Measure the replay error (see validation.py), which is shown beside the loss from then on."""
        self.replay_error = measure_replay_error(
            self.objective, self.dataset, sources, rows=self.settings.replay_check, processes=self.processes
        )
        self._log(step=self.done, replay_error=self.replay_error.error, replay_error_by_step=self.replay_error.by_step)
        return self.replay_error

    def resume(self, progress: Progress) -> None:
        """Take up the newest checkpoint that is whole, if there is one."""
        found = load_checkpoint(self.run, self.train_state, progress.say)
        folder, state = found or (None, {"step": 0, "best": None})
        self.best = state["best"]
        if self.processes.is_main_process and folder is not None:
            restore_best(folder, progress.say)
        self.done = int(state["step"])
        if self.metrics is not None:
            self.metrics.truncate_after(self.done)
        if folder is not None:
            progress.say(f"resuming from step {self.done}")

    def _log(self, **entry: Any) -> None:
        if self.metrics is not None:
            self.metrics.log(**entry)

    def _note(self, stage: Stage, loss: float) -> str:
        beside = (
            f" (replay error {self.replay_error.error:.3g})" if self.replay_error is not None and stage.predicts else ""
        )
        return f"{stage.loss} loss {loss:.4g}{beside}"

    def _optimizer_step(self, at: StepOfStage, batches: _Batches) -> float:
        started = time.monotonic()
        self.clock.begin()
        if at.number and not at.position:
            # The moments of a warm-up are of another loss: with them the first vision steps are far too long.
            self.train_state.reset_optimizer()
        optimizer = self.train_state.optimizer
        rate = set_learning_rate(optimizer, at)
        self.student.train()
        optimizer.zero_grad(set_to_none=True)
        self.clock.mark("optimizer")
        losses, norm = self._update(at, batches)
        self._check_finite(at, losses, norm)
        loss, beside = _means(at.stage, losses)
        self._log(
            step=at.step,
            loss=loss,
            kind=at.stage.loss,
            stage=at.stage.name,
            learning_rate=rate,
            gradient_norm=norm,
            **beside,
            seconds=round(time.monotonic() - started, 4),
        )
        self.clock.mark("optimizer")
        self.clock.end(at.stage.name)
        return loss

    def _update(self, at: StepOfStage, batches: _Batches) -> tuple[list[float], float]:
        """Move the student: losses of all parts of all processes, and the norm of the gradient before clipping.

        They may be infinite or NaN, and the student is then spoilt: stop the run.
        """
        with self.objective.conditions_checked_at_the_end():
            losses = [self._gradients(at, part, self._next(batches)) for part in range(at.stage.parts_per_process)]
            norm = self.train_state.update(at.step)
            # The one place of a step where the device is waited for, when all of its kernels are queued.
            *values, whole = torch.stack([*losses, norm]).tolist()
        return self._pauses.gathered(values), whole

    def _next(self, batches: _Batches) -> Batch | EmbeddingBatch:
        batch = next(batches)
        self.clock.mark("data_wait")
        return batch

    def _gradients(self, at: StepOfStage, number: int, batch: Batch | EmbeddingBatch) -> torch.Tensor:
        """Add the gradients of a part of the step; number: its place among those of this process."""
        parts, rows = at.stage.grad_accum_steps, len(batch.token_ids_BT)
        of_prompts, part = divmod(number, parts)
        # Dropout masks are a function of (seed, step, row of the batch): a resumed run draws the same ones.
        torch.manual_seed(mix(self.settings.seed, at.step, *[1] * of_prompts))
        first = (self.processes.rank * parts + part) * rows
        student = self.train_state.parallel_student
        with self.processes.part(student, last=number == at.stage.parts_per_process - 1):
            with BatchInvariantDropout(first=first, rows=self.processes.ranks * parts * rows):
                student_BTD = self.embed(student, batch.token_ids_BT)
            self.clock.mark("student_forward")
            loss = self.objective.training_loss(at.stage, student_BTD, batch)
            self.clock.mark("backbone_forward" if isinstance(batch, Batch) else "loss")
            (loss / parts).backward()
            self.clock.mark("backward")
        return loss.detach()

    def _check_finite(self, at: StepOfStage, losses: Sequence[float], norm: float) -> None:
        # Of all parts in all processes: they stop together.
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                rows, of_prompts = self.plan.rows_of_part(at, number)
                self._stop(at, "loss", loss, rows, of_prompts=of_prompts)
        if not math.isfinite(norm):
            self._stop(at, "norm of the gradient", norm, self.plan.rows(at))

    def _stop(self, at: StepOfStage, what: str, value: float, rows: Rows, *, of_prompts: bool = False) -> NoReturn:
        kind = "context" if of_prompts else at.stage.loss
        replays = at.stage.replays and not of_prompts
        records = [self.dataset.name_of(place) + (f" step {k}" if replays else "") for place, k in rows]
        self._log(step=at.step, stopped=f"{what} is {value}", records=records)
        more = f" and {len(records) - _NAMED} more (metrics.jsonl names them)" if len(records) > _NAMED else ""
        raise NonFiniteError(
            f"{kind} {what} is {value} at step {at.step}, "
            f"in the batch of {', '.join(records[:_NAMED])}{more}: "
            f"stopped, the last checkpoint is intact; lower --learning-rate and run it again with a new run folder"
        )

    def _checkpoint(self, progress: Progress, *, validate: bool) -> None:
        """validate: measure the validation loss; where a run is stopped there may be no time for it."""
        loss = self.validate(self.done) if validate and measured_sources(self.objective, self.held_out) else None
        is_best = loss is not None and (self.best is None or loss < self.best)
        # The same measure in all stages: what is loaded does not change.
        self.best = loss if is_best else self.best
        state = {"best": self.best, "is_best": is_best}
        folder = save_checkpoint(self.run, self.done, self.train_state, self._tokenizer, state, progress.say)
        if not self.processes.is_main_process:
            return
        if loss is not None and self.best is not None:
            if is_best:
                mark_best(self.run, folder, loss)
            progress.say(validation_text(folder, loss, self.best, self.settings.keep_checkpoints))
            reached = self.replay_error.reached_text(loss) if self.replay_error is not None and is_best else None
            if reached:
                progress.say(reached)
        delete_old_checkpoints(folder, self.settings.keep_checkpoints)
        for observer in self._observers:
            observer.on_checkpoint(self.run, self.done)


def _means(stage: Stage, losses: Sequence[float]) -> tuple[float, dict[str, float]]:
    """The mean loss of a step, and what is logged beside it: that of its prompts, with a context_loss_weight."""
    if not stage.context_loss_weight:
        return sum(losses) / len(losses), {}
    # Of each process, the losses of its trajectories come before those of its prompts.
    of_prompts = [loss for number, loss in enumerate(losses) if number // stage.grad_accum_steps % 2]
    of_trajectories = [loss for number, loss in enumerate(losses) if not number // stage.grad_accum_steps % 2]
    weighted_context_loss = sum(of_prompts) / len(of_prompts)
    return sum(of_trajectories) / len(of_trajectories), {"weighted_context_loss": weighted_context_loss}
