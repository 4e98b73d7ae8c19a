"""The loop of a run: batch, loss, optimizer step, checkpoint. What it computes is a function of the step number."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from models.backbone import FluxBackbone
from models.student_network import UnderstudyStudent
from storage_schemas.errors import NonFinite, NotInCache
from storage_schemas.fields import Array
from storage_schemas.progress import Progress
from storage_schemas.reader import Cache
from trainer.checkpoints import load_checkpoint, mark_best, save_checkpoint
from trainer.feed import Batch, EmbeddingBatch, Feed, Request
from trainer.losses import embedding_loss, replay, vision_loss
from trainer.optimizer import make_optimizer, set_learning_rate
from trainer.order import Order, mix
from trainer.run_folder import forget_metrics_after, log_metrics
from trainer.settings import TrainSettings
from trainer.training_set import TrainingSet


class Trainer:
    """One run: the student, its optimizer, the feed and the frozen backbone."""

    def __init__(
        self,
        run: Path,
        settings: TrainSettings,
        cache: Cache,
        backbone: FluxBackbone | None,
        student: UnderstudyStudent,
        device: torch.device,
        training_set: TrainingSet,
    ) -> None:
        self.run, self.settings, self.backbone, self.device = run, settings, backbone, device
        self.feed, self.held_out = _split(cache, device, training_set.indices())
        self.student = student.to(device)
        self.optimizer = make_optimizer(self.student, settings)
        self.order = Order(
            kind=settings.order,
            count=len(self.feed),
            steps=cache.manifest.sampling.steps,
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
        self.best: float | None = None
        self._tokenizer = cache.tokenizer_files

    def train(self, progress: Progress) -> float | None:
        """Run to the last step from the newest checkpoint; the best validation loss."""
        first = self._resume(progress)
        total = self.settings.total_steps
        requests = (Request(loss=self.settings.loss_at(n), rows=self.order.batch(n)) for n in range(first, total))
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

    def _resume(self, progress: Progress) -> int:
        state = load_checkpoint(self.run, self.student, self.optimizer, progress.say)
        if state is None:
            forget_metrics_after(self.run, 0)
            return 0
        self.best = state["best"]
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
        loss = self._loss(next(batches))
        value = float(loss.detach())
        if not np.isfinite(value):
            raise NonFinite(
                f"{self.settings.loss_at(step)} loss is {value} at step {step}: stopped, the last checkpoint is "
                f"intact; lower --learning-rate and give the command again in a new run folder"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.settings.clip)
        self.optimizer.step()
        log_metrics(
            self.run,
            step=step,
            loss=value,
            kind=self.settings.loss_at(step),
            learning_rate=rate,
            gradient_norm=float(norm),
            seconds=round(time.monotonic() - started, 4),
        )
        return value

    def _loss(self, batch: Batch | EmbeddingBatch) -> torch.Tensor:
        student_BTD = self._embed(batch.token_ids_BT)
        if isinstance(batch, EmbeddingBatch):
            return embedding_loss(student_BTD, batch.encoder_hidden_states_BTD)
        assert self.backbone is not None
        return vision_loss(self.backbone, student_BTD, batch)

    def _embed(self, token_ids_BT: torch.Tensor) -> torch.Tensor:
        # bf16 autocast around the student alone: around the backbone it would change the target's arithmetic.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.student(token_ids_BT)[0]

    def _checkpoint(self, done: int) -> None:
        loss = self.validate(done) if len(self.held_out) else None
        is_best = loss is not None and (self.best is None or loss < self.best)
        # A warm-up's vision loss and a vision stage's are compared alike: both are measured by replay.
        self.best = loss if is_best else self.best
        folder = save_checkpoint(self.run, done, self.student, self.optimizer, self._tokenizer, {"best": self.best})
        if is_best and loss is not None:
            mark_best(self.run, folder, loss)

    @torch.no_grad()
    def validate(self, done: int) -> float:
        """Loss on held-out trajectories, at steps spread evenly: vision if there is a backbone, else embedding."""
        self.student.eval()
        rows = _validation_rows(len(self.held_out), self.order.steps, self.settings.validate_rows)
        losses = []
        for first in range(0, len(rows), self.settings.batch_size):
            part = rows[first : first + self.settings.batch_size]
            loss = self._loss(
                self.held_out.replay_batch(part)
                if self.backbone is not None
                else self.held_out.embedding_batch([position for position, _ in part])
            )
            losses.append(float(loss) * len(part))
        value = sum(losses) / len(rows)
        log_metrics(self.run, step=done, validation_loss=value)
        return value

    @torch.no_grad()
    def replay_floor(self) -> tuple[float, float]:
        """The loss of a perfect student here: mean squared error, and norm of the error per norm of velocity."""
        assert self.backbone is not None
        rows = _validation_rows(len(self.feed), self.order.steps, self.settings.validate_rows)
        error = norm = count = 0.0
        for first in range(0, len(rows), self.settings.batch_size):
            part = rows[first : first + self.settings.batch_size]
            batch = self.feed.replay_batch(part)
            teacher_BTD = self.feed.teacher_embeddings([self.feed.prompt_of(position) for position, _ in part])
            target_BSC = batch.velocity_BSC.float()
            difference_BSC = replay(self.backbone, teacher_BTD, batch).float() - target_BSC
            error += float(difference_BSC.square().sum())
            norm += float(target_BSC.square().sum())
            count += target_BSC.numel()
        return error / count, (error / norm) ** 0.5


def _split(cache: Cache, device: torch.device, indices: Array) -> tuple[Feed, Feed]:
    held = [prompt.held_out for prompt in cache.prompts]
    mask = np.array([held[cache.layout.place(int(index)).prompt] for index in indices], dtype=bool)
    if not len(indices) or mask.all():
        raise NotInCache(
            f"{cache.folder} has {len(indices)} committed trajectories, {int(mask.sum())} of them held out: nothing to "
            f"train on; build more prompts"
        )
    return Feed(cache, indices[~mask], device=device), Feed(cache, indices[mask], device=device)


def _validation_rows(count: int, steps: int, wanted: int) -> list[tuple[int, int]]:
    rows = min(wanted, count * steps)
    return [(row % count, (row * steps // rows + row // count) % steps) for row in range(rows)]
