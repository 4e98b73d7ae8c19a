"""The loop of a run: batch, loss, optimizer step, checkpoint. What it computes is a function of the step number."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from secondcast.models.student.student import Student
from secondcast.models.student.tokens import StudentTokens
from secondcast.storage_schemas.errors import NonFiniteError
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.trainer.data.mixture import TrainingCache, prompt_orders, split, stage_orders
from secondcast.trainer.data.replay_dataset import Batch, BatchSpec, EmbeddingBatch, Key, Rows
from secondcast.trainer.data.sampler import mix, rank_slice
from secondcast.trainer.distributed.processes import SINGLE_PROCESS, Distributed
from secondcast.trainer.distributed.sharding import full_norm, full_student_of
from secondcast.trainer.dropout import BatchInvariantDropout
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.losses.validation import ReplayError, measure_replay_error, measured_sources, validation_loss
from secondcast.trainer.optimizer import EMA, make_optimizer, set_learning_rate
from secondcast.trainer.run.checkpoints import (
    delete_old_checkpoints,
    load_checkpoint,
    mark_best,
    restore_best,
    save_checkpoint,
    validation_text,
)
from secondcast.trainer.run.metrics import Metrics
from secondcast.trainer.run.stopping import CheckpointTimer
from secondcast.trainer.run.timing import StepClock
from secondcast.trainer.settings import StepOfStage, TrainSettings
from secondcast.trainer.stage import Stage

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
        self._observers = observers
        self.run, self.settings, self.objective, self.device = run, settings, objective, device
        self.dataset, self.held_out = split(training_caches, device, tokens, objective.host_modulation)
        self.processes, self.metrics = processes, metrics
        self.done = 0
        self._pauses = CheckpointTimer(processes, minutes=settings.checkpoint_minutes)
        self.clock = StepClock.of(device)
        self._full_student = full_student_of(student) if processes.sharded and processes.is_main_process else None
        self.average = EMA(student, settings.ema_decay) if settings.ema_decay is not None else None
        self.student = processes.placed(student, device)
        if self.average is not None:
            self.average.student = processes.placed(self.average.student, device)
        self._parallel_student = processes.synchronized(self.student)
        self.optimizer = make_optimizer(self.student, settings)
        self.orders = stage_orders(settings, training_caches, self.dataset)
        self._prompt_orders = prompt_orders(settings, training_caches, self.dataset)
        self.best: float | None = None
        self.replay_error: ReplayError | None = None
        self.autocast = autocast
        self._tokenizer = training_caches[0].cache.tokenizer_files if tokens is None else tokens.files

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
        requests = (request for step in steps for request in self.requests(step))
        with self._pauses.listening(progress.say), self.dataset.prefetch(requests) as batches:
            for number, end in enumerate(self.settings.ends):
                if self.done < end and self._train_stage(number, batches, progress):
                    break
        if self._pauses.wish.stop:
            raise KeyboardInterrupt
        return self.best

    def _train_stage(self, number: int, batches: Iterator[Batch | EmbeddingBatch], progress: Progress) -> bool:
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
                        self._checkpoint(self.done, progress, validate=due)
                    self._pauses.kept()
                if wish.stop:
                    return True
        return False

    def timed_steps(self) -> list[TimedStep]:
        """Take all steps without a checkpoint."""
        taken = []
        steps = range(self.settings.total_steps)
        with self.dataset.prefetch(request for step in steps for request in self.requests(step)) as batches:
            for step in steps:
                began = time.monotonic()
                loss = self._optimizer_step(self.settings.at(step), batches)
                taken.append(TimedStep(loss=loss, seconds=time.monotonic() - began))
        return taken

    def requests(self, step: int) -> list[BatchSpec]:
        """The records that optimizer step `step` reads: equal parts of its batch, or of this process's part of it.

        With a context_loss_weight as many parts of prompts follow.
        """
        at = self.settings.at(step)
        stage = at.stage
        rank, ranks = self.processes.rank, self.processes.ranks
        rows_per_pass = stage.grad_accum_steps * (stage.timesteps_per_sample if stage.replays else 1)
        rows = rank_slice(self._rows(at), rank=rank, ranks=ranks, rows_per_pass=rows_per_pass)
        size = len(rows) // stage.grad_accum_steps
        prompts = rank_slice(self._prompt_rows(at), rank=rank, ranks=ranks, rows_per_pass=stage.grad_accum_steps)
        of_prompts = [BatchSpec(replays=False, rows=part) for part in _parts(prompts, stage.grad_accum_steps)]
        return [
            BatchSpec(
                replays=stage.replays,
                rows=rows[first : first + size],
                timesteps_per_sample=stage.timesteps_per_sample if stage.replays else 1,
                embeddings=stage.replays and stage.needs_embeddings,
            )
            for first in range(0, len(rows), size)
        ] + of_prompts

    def _prompt_rows(self, at: StepOfStage) -> Rows:
        """The prompts that a step compares beside its trajectories, all processes together; mostly none."""
        order = self._prompt_orders[at.number]
        return [] if order is None else order.batch(at.position)

    def _rows(self, at: StepOfStage) -> Rows:
        """The batch of an optimizer step, all processes together."""
        return self.orders[at.number].batch(at.position)

    def embed(self, student: torch.nn.Module, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """encoder_hidden_states_BTD of the student, in the run's arithmetic."""
        # bf16 autocast around the student alone: around the backbone it would change the target's arithmetic.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            embedding_BTD: torch.Tensor = student(token_ids_BT)[0]
            return embedding_BTD

    @torch.no_grad()
    def embeddings(self, prompts: Sequence[Key]) -> torch.Tensor:
        """encoder_hidden_states_BTD of prompts by the student that is validated; called by all processes."""
        return self.embed(self.eval_student.eval(), self.dataset.token_ids(prompts))

    @property
    def eval_student(self) -> Student:
        """The student that is validated and exported: the average where there is one."""
        return self.student if self.average is None else self.average.student

    @property
    def plain_student(self) -> Student:
        """A student whose class and configuration are those of an undivided one; in the first process."""
        return self.student if self._full_student is None else self._full_student

    def validate(self, done: int) -> float:
        """Loss on held-out trajectories, at steps spread evenly: see validation_loss."""
        student = self.eval_student.eval()
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
        averaged = self.average.student if self.average is not None else None
        found = load_checkpoint(
            self.run, self.student, self.optimizer, progress.say, averaged=averaged, processes=self.processes
        )
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

    def _optimizer_step(self, at: StepOfStage, batches: Iterator[Batch | EmbeddingBatch]) -> float:
        started = time.monotonic()
        self.clock.begin()
        if at.number and not at.position:
            # The moments of a warm-up are of another loss: with them the first vision steps are far too long.
            self.optimizer = make_optimizer(self.student, self.settings)
        rate = set_learning_rate(self.optimizer, at)
        self.student.train()
        self.optimizer.zero_grad(set_to_none=True)
        self.clock.mark("optimizer")
        losses, norm = self._update(at, batches)
        self._check_finite(at, losses)
        parts, beside = at.stage.grad_accum_steps, {}
        if at.stage.context_loss_weight:
            # Of each process, the losses of its trajectories come before those of its prompts.
            of_prompts = [loss for number, loss in enumerate(losses) if number // parts % 2]
            losses = [loss for number, loss in enumerate(losses) if not number // parts % 2]
            beside = {"weighted_context_loss": sum(of_prompts) / len(of_prompts)}
        value = sum(losses) / len(losses)
        if not math.isfinite(norm):
            self._stop(at, "norm of the gradient", norm, self._rows(at))
        self._log(
            step=at.step,
            loss=value,
            kind=at.stage.loss,
            stage=at.stage.name,
            learning_rate=rate,
            gradient_norm=norm,
            **beside,
            seconds=round(time.monotonic() - started, 4),
        )
        self.clock.mark("optimizer")
        self.clock.end(at.stage.name)
        return value

    def _update(self, at: StepOfStage, batches: Iterator[Batch | EmbeddingBatch]) -> tuple[list[float], float]:
        """Move the student: losses of all parts of all processes, and the norm of the gradient before clipping.

        They may be infinite or NaN, and the student is then spoilt: stop the run.
        """
        with self.objective.conditions_checked_at_the_end():
            parts = at.stage.grad_accum_steps * (2 if at.stage.context_loss_weight else 1)
            losses = [self._gradients(at, part, self._next(batches)) for part in range(parts)]
            norm = full_norm(torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.max_grad_norm))
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.student, at.step)
            # The one place of a step where the device is waited for, when all of its kernels are queued.
            *values, whole = torch.stack([*losses, norm]).tolist()
        return self._pauses.gathered(values), whole

    def _next(self, batches: Iterator[Batch | EmbeddingBatch]) -> Batch | EmbeddingBatch:
        batch = next(batches)
        self.clock.mark("data_wait")
        return batch

    def _gradients(self, at: StepOfStage, part: int, batch: Batch | EmbeddingBatch) -> torch.Tensor:
        parts, rows = at.stage.grad_accum_steps, len(batch.token_ids_BT)
        of_prompts, part = divmod(part, parts)
        # Dropout masks are a function of (seed, step, row of the batch): a resumed run draws the same ones.
        torch.manual_seed(mix(self.settings.seed, at.step, *[1] * of_prompts))
        first = (self.processes.rank * parts + part) * rows
        last = part == parts - 1 and bool(of_prompts) == bool(at.stage.context_loss_weight)
        with self.processes.part(self._parallel_student, last=last):
            with BatchInvariantDropout(first=first, rows=self.processes.ranks * parts * rows):
                student_BTD = self.embed(self._parallel_student, batch.token_ids_BT)
            self.clock.mark("student_forward")
            loss = self.objective.training_loss(at.stage, student_BTD, batch)
            self.clock.mark("backbone_forward" if isinstance(batch, Batch) else "loss")
            (loss / parts).backward()
            self.clock.mark("backward")
        return loss.detach()

    def _check_finite(self, at: StepOfStage, losses: Sequence[float]) -> None:
        # Of all parts in all processes: they stop together.
        for number, loss in enumerate(losses):
            if not math.isfinite(loss):
                rank, part = divmod(number, len(losses) // self.processes.ranks)
                of_prompts, part = divmod(part, at.stage.grad_accum_steps)
                rows = self._prompt_rows(at) if of_prompts else self._rows(at)
                in_order = rank * at.stage.grad_accum_steps + part
                parts = _parts(rows, self.processes.ranks * at.stage.grad_accum_steps)
                self._stop(at, "loss", loss, parts[in_order], of_prompts=bool(of_prompts))

    def _stop(self, at: StepOfStage, what: str, value: float, rows: Rows, *, of_prompts: bool = False) -> NoReturn:
        kind = "context" if of_prompts else at.stage.loss
        replays = at.stage.replays and not of_prompts
        records = [self.dataset.name_of(place) + (f" step {k}" if replays else "") for place, k in rows]
        self._log(step=at.step, stopped=f"{what} is {value}", records=records)
        more = f" and {len(records) - _NAMED} more (metrics.jsonl names them)" if len(records) > _NAMED else ""
        raise NonFiniteError(
            f"{kind} {what} is {value} at step {at.step}, in the batch of {', '.join(records[:_NAMED])}{more}: "
            f"stopped, "
            f"the last checkpoint is intact; lower --learning-rate and run it again with a new run folder"
        )

    def _checkpoint(self, done: int, progress: Progress, *, validate: bool) -> None:
        """validate: measure the validation loss; where a run is stopped there may be no time for it."""
        loss = self.validate(done) if validate and measured_sources(self.objective, self.held_out) else None
        is_best = loss is not None and (self.best is None or loss < self.best)
        # The same measure in all stages: what is loaded does not change.
        self.best = loss if is_best else self.best
        folder = save_checkpoint(
            self.run,
            done,
            self.student,
            self.optimizer,
            self._tokenizer,
            {"best": self.best, "is_best": is_best},
            progress.say,
            averaged=self.average.student if self.average is not None else None,
            processes=self.processes,
            full_student=self._full_student,
        )
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
            observer.on_checkpoint(self.run, done)


def _parts(rows: Rows, count: int) -> list[Rows]:
    """Rows in `count` equal parts; none of no rows."""
    size = len(rows) // count
    return [rows[first : first + size] for first in range(0, len(rows), size or 1)]
