"""Optimizer steps, timed: the loop of the paper, and the same steps from a cache."""

import time
from dataclasses import dataclass, field, replace

import torch

from benchmarks.random_teacher import random_student
from secondcast.models.backbone import Backbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.sampler import euler_step
from secondcast.models.teacher.text_encoder import TeacherTextEncoder
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.data.replay_dataset import Batch, BatchSpec, ReplayDataset, Source
from secondcast.trainer.losses.vision import replay, vision_loss

RATE, WEIGHT_DECAY, CLIP = 1e-4, 1e-3, 1.0


@dataclass
class Measured:
    """Of each step: seconds, of them those of waiting for data, and the loss."""

    seconds: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def add(self, began: float, waited: float, loss: torch.Tensor) -> None:
        """A step that is over once its loss and the new weights are there."""
        self.losses.append(float(loss.detach()))
        if loss.device.type == "cuda":
            torch.cuda.synchronize(loss.device)
        self.seconds.append(time.perf_counter() - began)
        self.waits.append(waited)


class Training:
    """A student, its optimizer, a backbone and a cache of which a batch is followed from step to step.

    student: source of its configuration. `first_gradient`: of its parameters, flat, fp32, on the host.
    """

    def __init__(self, student: str, backbone: Backbone, cache: Cache, batch_size: int) -> None:
        self.device, self.manifest, self.batch_size = backbone.device, cache.manifest, batch_size
        self.backbone = backbone.at(recorded_geometry(self.manifest.sampling))
        self.dataset = ReplayDataset([Source(cache=cache, indices=cache.indices()[:batch_size])], device=self.device)
        self.student = random_student(student, self.manifest, self.device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
        self.first_gradient: torch.Tensor | None = None

    @property
    def steps(self) -> int:
        """Those of the recorded walks."""
        return self.manifest.sampling.steps

    def rows(self, step: int) -> list[tuple[int, int]]:
        """The batch at one step."""
        return [(position, step) for position in range(self.batch_size)]

    def step(self, number: int, batch: Batch) -> torch.Tensor:
        """One optimizer step; its loss."""
        # The same dropout masks however the backbone is held.
        torch.manual_seed(number)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            student_BTD = self.student(batch.token_ids_BT)[0]
        loss = vision_loss(self.backbone, student_BTD, batch)
        loss.backward()
        if self.first_gradient is None:
            # One by one: together they would be a part of the GPU's peak.
            gradients = [p.grad.flatten().cpu() for p in self.student.parameters() if p.grad is not None]
            self.first_gradient = torch.cat(gradients)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def offline_steps(training: Training) -> Measured:
    """From the cache, read ahead as `secondcast train` does."""
    found = Measured()
    requests = (BatchSpec(replays=True, rows=training.rows(step)) for step in range(training.steps))
    with training.dataset.prefetch(requests) as batches:
        for step in range(training.steps):
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            assert isinstance(batch, Batch)
            found.add(began, waited, training.step(step, batch))
    return found


def online_steps(training: Training, text_encoder: TeacherTextEncoder) -> Measured:
    """The loop of the paper, with the text encoded at every step as in its script, from the cache's noise."""
    found, sampling = Measured(), training.manifest.sampling
    given = training.dataset.replay_batch(training.rows(0))
    sigmas = torch.tensor(sampling.sigmas, dtype=torch.float32)
    dt_K = (sigmas[1:] - sigmas[:-1]).to(device=training.device, dtype=training.backbone.dtype)
    x_BSC = given.hidden_states_BSC
    for step, timestep in enumerate(sampling.timesteps):
        began = time.perf_counter()
        batch = replace(given, hidden_states_BSC=x_BSC, timestep_B=torch.full_like(given.timestep_B, timestep))
        with torch.no_grad():
            target_BSC = replay(training.backbone, text_encoder.encode(batch.token_ids_BT), batch)
        loss = training.step(step, replace(batch, velocity_BSC=target_BSC))
        x_BSC = euler_step(x_BSC, target_BSC, dt_K[step])
        found.add(began, 0.0, loss)
    return found
