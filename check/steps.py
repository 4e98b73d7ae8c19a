"""Optimizer steps of a check: offline by the product's own trainer, online by a loop written from the paper."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from secondcast.check.teachers import CheckTeacher
from secondcast.models.backbone import Backbone
from secondcast.models.device import deterministic_algorithms
from secondcast.models.families.text import Text, recorded_text
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.recorded_backbone import recorded_schedule
from secondcast.models.sampler import guided, steps_of
from secondcast.models.student.student import Student, new_student
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.tensors import stacked, to_torch
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.data.sampler import Part, Sampler
from secondcast.trainer.loop import Trainer
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.preparing.loading import uses_autocast
from secondcast.trainer.settings import TrainFlags, TrainSettings
from secondcast.trainer.training_set import TrainingSet

_SEED = 0


def cache_folder(folder: Path) -> Path:
    """The cache of a check."""
    return folder / "cache"


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Consecutive optimizer steps: losses, seconds, the last gradient (clipped) and the weights behind it.

    gradient, weights: of all parameters of the student by name, fp32, on the host.
    """

    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    gradient: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]

    @classmethod
    def of(cls, student: Student, losses: Sequence[float], seconds: Sequence[float]) -> "Steps":
        """After the last step, before its gradient is freed."""
        parameters = dict(student.named_parameters())
        return cls(
            losses=tuple(losses),
            seconds=tuple(seconds),
            gradient={
                name: torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.cpu()
                for name, p in parameters.items()
            },
            weights={name: p.detach().cpu() for name, p in parameters.items()},
        )

    def equals(self, other: "Steps") -> bool:
        """Whether losses, gradient and weights are equal bit for bit."""
        return (
            self.losses == other.losses
            and _all_equal(self.gradient, other.gradient)
            and _all_equal(self.weights, other.weights)
        )

    def differences(self, other: "Steps") -> tuple[float, float]:
        """Largest relative difference of the losses, and relative difference of the gradient, to `other`."""
        losses = max(abs(a - b) / abs(b) for a, b in zip(self.losses, other.losses, strict=True))
        mine, theirs = (torch.cat([g.flatten().double() for g in one.gradient.values()]) for one in (self, other))
        return losses, float((mine - theirs).norm() / theirs.norm())


def _all_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Training:
    """What the steps of a check have in common.

    folder: of the check, with the cache, the configuration of the student, and the runs.
    """

    def __init__(self, teacher: CheckTeacher, folder: Path) -> None:
        self.teacher, self.folder = teacher, folder

    @cached_property
    def cache(self) -> Cache:
        """The recorded cache."""
        return Cache.open(str(cache_folder(self.folder)))

    @cached_property
    def student_source(self) -> str:
        """The source of the student's configuration."""
        return self.teacher.student_source(self.folder / "student")

    @cached_property
    def student(self) -> Student:
        """An initial student of random weights, always the same."""
        teacher = self.teacher.planned[0].teacher
        return new_student(self.student_source, teacher, init="random", dropout=0.0, seed=_SEED)

    def settings(self, steps: int, options: MemoryOptions) -> TrainSettings:
        """Of a run over the whole cache in the paper's order."""
        return TrainFlags.from_flags(
            student=self.student_source,
            init="random",
            dropout=0.0,
            seed=_SEED,
            steps=steps,
            batch_size=self.teacher.scale.batch_size,
            data_order="sequential",
            replay_check=self.teacher.scale.batch_size * self.teacher.scale.steps,
            **options.model_dump(),
        ).settings()

    def trainer(self, backbone: Backbone, settings: TrainSettings) -> Trainer:
        """The trainer of `secondcast train` with its own copy of the student."""
        caches = [TrainingCache(name="cache", cache=self.cache, training_set=TrainingSet.of(self.cache))]
        manifest, device = self.cache.manifest, self.teacher.device
        objective = Objective(
            settings=settings, backbones=[backbone], context_ID=None, sigmas=[manifest.sampling.sigmas]
        )
        return Trainer(
            self.folder,
            settings,
            caches,
            objective,
            copy.deepcopy(self.student),
            device,
            autocast=uses_autocast(settings, manifest, device),
        )

    def offline(self, backbone: Backbone, steps: int, options: MemoryOptions) -> Steps:
        """Steps from the cache, by the trainer."""
        trainer = self.trainer(backbone, self.settings(steps, options))
        taken = trainer.timed_steps()
        return Steps.of(trainer.student, [step.loss for step in taken], [step.seconds for step in taken])

    def _rows(self, settings: TrainSettings) -> list[int]:
        """The trajectories of a run's first batch, in their order in it."""
        stage, rows = settings.stages[0], self.teacher.scale.batch_size
        order = Sampler(
            kind=stage.data_order,
            parts=(Part(count=rows),),
            steps=self.teacher.scale.steps,
            batch_size=rows,
            seed=settings.seed,
        )
        return [position for position, _ in order.batch(0)]

    def online(self, steps: int) -> Steps:
        """The paper's loop (section 3): teacher and student side by side, the latent follows the teacher.

        Of the cache it takes what a seed would give: prompts, noise, guidance, and the schedule. Both large networks
        are on the device.
        """
        manifest, device = self.cache.manifest, self.teacher.device
        settings = self.settings(steps, MemoryOptions())
        student = copy.deepcopy(self.student).to(device).train()
        optimizer = _adamw(student, settings)
        call = _Call(self.teacher, self.cache, self._rows(settings))
        losses = []
        for k in range(steps):
            # By the kernels that recorded the cache.
            with torch.no_grad():
                target_BSC = call.teacher(k)
            with deterministic_algorithms():
                with torch.autocast(device.type, torch.bfloat16, enabled=uses_autocast(settings, manifest, device)):
                    student_BTD = student(call.token_ids_BT)[0]
                loss = torch.nn.functional.mse_loss(call(student_BTD.to(target_BSC), k).float(), target_BSC.float())
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
                optimizer.step()
            call.follow(k)
            losses.append(float(loss.detach()))
        return Steps.of(student, losses, [])


def _adamw(student: Student, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW as the paper states it: weight decay on the encoder alone."""
    named = list(student.named_parameters())
    encoder = [p for name, p in named if name.startswith("encoder.")]
    others = [p for name, p in named if not name.startswith("encoder.")]
    return torch.optim.AdamW(
        [{"params": encoder, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.stages[0].learning_rate,
        fused=True if student.device.type == "cuda" else None,
    )


class _Call:
    """The unmodified teacher of the online loop at its latent, which `follow` moves."""

    def __init__(self, teacher: CheckTeacher, cache: Cache, rows: Sequence[int]) -> None:
        manifest, device = cache.manifest, teacher.device
        trajectories = [cache.trajectory(row) for row in rows]
        self._sampling, self._family = manifest.sampling, teacher.folder.family
        self._encoder, self._transformer = teacher.text_encoder(), teacher.transformer()
        self.token_ids_BT = torch.stack(
            [torch.from_numpy(cache.padded_token_ids(t.prompt)) for t in trajectories]
        ).to(device)  # fmt: skip
        self._x_BSC = torch.stack([to_torch(t.hidden_states_KSC[0]) for t in trajectories]).to(device)
        conditioning = stacked([cache.conditioning(t.prompt) for t in trajectories])
        self._conditioning = {name: row.to(device) for name, row in conditioning.items()}
        self._negative = None if cache.negative is None else recorded_text(cache, [cache.negative]).on(device)
        self._moving_BSC = self._x_BSC
        self._step = steps_of(recorded_schedule(manifest), self._x_BSC)
        self._guidance_B: torch.Tensor | None = None
        if manifest.sampling.guidance is not None:
            self._guidance_B = torch.tensor([t.guidance for t in trajectories], device=device)
        self._positions: dict[str, Any] = self._family.positions(
            recorded_geometry(manifest.sampling),
            manifest.teacher.text_length,
            device=device,
            dtype=teacher.torch_dtype,
        )

    def teacher(self, k: int) -> torch.Tensor:
        """The teacher's prediction at step k, with its text encoded at every step as in the paper's script."""
        text = Text(embedding_BTD=self._encoder.encode(self.token_ids_BT), conditioning=self._conditioning)
        if self._negative is None:
            self._moving_BSC = self._call(self._x_BSC, text, k)
            return self._moving_BSC
        found_BSC = self._call(torch.cat([self._x_BSC, self._x_BSC]), text.after(self._negative), k)
        negative_BSC, target_BSC = found_BSC.chunk(2)
        assert self._guidance_B is not None
        self._moving_BSC = guided(negative_BSC, target_BSC, self._guidance_B)
        return target_BSC

    def __call__(self, embedding_BTD: torch.Tensor, k: int) -> torch.Tensor:
        """The prediction at step k with another embedding."""
        return self._call(self._x_BSC, Text(embedding_BTD=embedding_BTD, conditioning=self._conditioning), k)

    def _call(self, x_BSC: torch.Tensor, text: Text, k: int) -> torch.Tensor:
        dtype = self._family.timestep_dtype(x_BSC.dtype)
        timestep_B = torch.full((len(x_BSC),), self._sampling.timesteps[k], device=x_BSC.device).to(dtype)
        return self._family.call(
            self._transformer,
            x_BSC,
            text.embedding_BTD,
            text.conditioning,
            timestep_B,
            self._guidance_B,
            self._positions,
        )

    def follow(self, k: int) -> None:
        """Move the latent by the teacher's prediction."""
        self._x_BSC = self._step(k, self._x_BSC, self._moving_BSC)
