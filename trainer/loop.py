"""The loop of a run: batch, loss, optimizer step, checkpoint. What it computes is a function of the step number."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from models.student_network import UnderstudyStudent
from storage_schemas.errors import NonFinite, NotInCache
from storage_schemas.fields import Array
from storage_schemas.progress import Progress
from storage_schemas.reader import Cache
from trainer.average import Average
from trainer.checkpoints import forget_old, load_checkpoint, mark_best, save_checkpoint
from trainer.feed import Batch, EmbeddingBatch, Feed, Request, Rows
from trainer.losses import Objective
from trainer.optimizer import make_optimizer, set_learning_rate
from trainer.order import Order, mix
from trainer.run_folder import forget_metrics_after, log_metrics
from trainer.settings import TrainSettings
from trainer.training_set import TrainingSet
from trainer.validation import replay_floor, validation_loss

# As many records of a batch are named in an error; metrics.jsonl has them all.
_NAMED = 4


class Trainer:
    """One run: the student, its optimizer, the feed and what it minimises.

    autocast: the student (never the backbone) computes in bf16; its parameters stay fp32.
    """

    def __init__(
        self,
        run: Path,
        settings: TrainSettings,
        cache: Cache,
        objective: Objective,
        student: UnderstudyStudent,
        device: torch.device,
        training_set: TrainingSet,
        *,
        autocast: bool,
    ) -> None:
        self.run, self.settings, self.objective, self.device = run, settings, objective, device
        self.feed, self.held_out = _split(cache, device, training_set.indices())
        self.student = student.to(device)
        self.average = Average(self.student, settings.ema) if settings.ema is not None else None
        self.optimizer = make_optimizer(self.student, settings)
        self.warmup_order, self.order = _orders(settings, count=len(self.feed), steps=cache.manifest.sampling.steps)
        self.best: float | None = None
        self._autocast = autocast
        self._tokenizer = cache.tokenizer_files

    def train(self, progress: Progress) -> float | None:
        """Run to the last step from the newest checkpoint; the best validation loss."""
        first = self._resume(progress)
        total = self.settings.total_steps
        requests = (request for step in range(first, total) for request in self.requests(step))
        with (
            self.feed.prefetch(requests) as batches,
            progress.bar("train", total=total, done=first, unit="steps") as bar,
        ):
            for step in range(first, total):
                loss = self._optimizer_step(step, batches)
                bar.advance(1, f"{self.settings.loss_at(step)} loss {loss:.4g}")
                done = step + 1
                if done % self.settings.checkpoint_every == 0 or done in (self.settings.warmup_steps, total):
                    self._checkpoint(done)
        return self.best

    def requests(self, step: int) -> list[Request]:
        """What optimizer step `step` reads: `accumulate` equal parts of its batch."""
        loss = self.settings.loss_at(step)
        order = self.warmup_order if step < self.settings.warmup_steps else self.order
        rows = order.batch(step)
        size = len(rows) // self.settings.accumulate
        term = loss == "vision" and self.settings.embedding_term > 0
        return [
            Request(loss=loss, rows=rows[first : first + size], share=order.share, embeddings=term)
            for first in range(0, len(rows), size)
        ]

    def embed(self, student: UnderstudyStudent, token_ids_BT: torch.Tensor) -> torch.Tensor:
        """encoder_hidden_states_BTD of the student, in the run's arithmetic."""
        # bf16 autocast around the student alone: around the backbone it would change the target's arithmetic.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return student(token_ids_BT)[0]

    @property
    def judged(self) -> UnderstudyStudent:
        """The student that is validated and exported: the average where there is one."""
        return self.student if self.average is None else self.average.student

    def validate(self, done: int) -> float:
        """Loss on held-out trajectories, at steps spread evenly: vision if there is a backbone, else of embeddings."""
        student = self.judged.eval()
        value = validation_loss(self.objective, self.held_out, lambda token_ids_BT: self.embed(student, token_ids_BT))
        log_metrics(self.run, step=done, validation_loss=value)
        return value

    def replay_floor(self) -> tuple[float, float]:
        """See validation.replay_floor."""
        return replay_floor(self.objective, self.feed)

    def _resume(self, progress: Progress) -> int:
        averaged = self.average.student if self.average is not None else None
        found = load_checkpoint(self.run, self.student, self.optimizer, progress.say, averaged=averaged)
        if found is None:
            forget_metrics_after(self.run, 0)
            return 0
        folder, state = found
        self.best = state["best"]
        if self.best is not None and state.get("is_best"):
            # A run that was killed between the two has the checkpoint and not the mark.
            mark_best(self.run, folder, self.best)
        forget_metrics_after(self.run, state["step"])
        progress.say(f"going on from step {state['step']}")
        return int(state["step"])

    def _optimizer_step(self, step: int, batches: Iterator[Batch | EmbeddingBatch]) -> float:
        started = time.monotonic()
        if step == self.settings.warmup_steps:
            # The moments of the warm-up are of another loss: with them the first vision steps are far too long.
            self.optimizer = make_optimizer(self.student, self.settings)
        rate = set_learning_rate(self.optimizer, self.settings, step)
        # Dropout masks are a function of (seed, step), so that a resumed run draws the same ones.
        torch.manual_seed(mix(self.settings.seed, step))
        self.student.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.settings.accumulate
        value = sum(self._gradients(step, part, next(batches)) for part in range(parts)) / parts
        norm = float(torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip))
        if not math.isfinite(norm):
            self._stop(step, "norm of the gradient", norm, [row for part in self.requests(step) for row in part.rows])
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.student, step)
        log_metrics(
            self.run,
            step=step,
            loss=value,
            kind=self.settings.loss_at(step),
            learning_rate=rate,
            gradient_norm=norm,
            seconds=round(time.monotonic() - started, 4),
        )
        return value

    def _gradients(self, step: int, part: int, batch: Batch | EmbeddingBatch) -> float:
        loss = self.objective.training_loss(step, self.embed(self.student, batch.token_ids_BT), batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            self._stop(step, "loss", value, self.requests(step)[part].rows)
        (loss / self.settings.accumulate).backward()
        return value

    def _stop(self, step: int, what: str, value: float, rows: Rows) -> NoReturn:
        kind = self.settings.loss_at(step)
        records = [self.feed.name_of(at) + (f" step {k}" if kind == "vision" else "") for at, k in rows]
        log_metrics(self.run, step=step, stopped=f"{what} is {value}", records=records)
        more = f" and {len(records) - _NAMED} more (metrics.jsonl names them)" if len(records) > _NAMED else ""
        raise NonFinite(
            f"{kind} {what} is {value} at step {step}, in the batch of {', '.join(records[:_NAMED])}{more}: stopped, "
            f"the last checkpoint is intact; lower --learning-rate and give the command again in a new run folder"
        )

    def _checkpoint(self, done: int) -> None:
        loss = self.validate(done) if len(self.held_out) else None
        is_best = loss is not None and (self.best is None or loss < self.best)
        # A warm-up's vision loss and a vision stage's are compared alike: both are measured by replay.
        self.best = loss if is_best else self.best
        folder = save_checkpoint(
            self.run,
            done,
            self.student,
            self.optimizer,
            self._tokenizer,
            {"best": self.best, "is_best": is_best},
            averaged=self.average.student if self.average is not None else None,
        )
        if is_best and loss is not None:
            mark_best(self.run, folder, loss)
        forget_old(folder, self.settings.keep)


def _orders(settings: TrainSettings, *, count: int, steps: int) -> tuple[Order, Order]:
    def order(share: int) -> Order:
        batch_size, seed = settings.batch_size, settings.seed
        return Order(kind=settings.order, count=count, steps=steps, batch_size=batch_size, seed=seed, share=share)

    # The losses of embeddings know no steps: nothing is shared there.
    return order(1), order(settings.steps_per_trajectory)


def _split(cache: Cache, device: torch.device, indices: Array) -> tuple[Feed, Feed]:
    held = [prompt.held_out for prompt in cache.prompts]
    mask = np.array([held[cache.layout.place(int(index)).prompt] for index in indices], dtype=bool)
    if not len(indices) or mask.all():
        raise NotInCache(
            f"{cache.folder} has {len(indices)} committed trajectories, {int(mask.sum())} of them held out: nothing to "
            f"train on; build more prompts"
        )
    return Feed(cache, indices[~mask], device=device), Feed(cache, indices[mask], device=device)
