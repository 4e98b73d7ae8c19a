"""Optimizer steps of FLUX.1-dev on the simulated device, as `secondcast train` computes them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from secondcast.models.backbone import Backbone
from secondcast.models.geometry import recorded_geometry
from secondcast.models.memory.checkpointing import activation_checkpointing
from secondcast.models.memory.modulation_table import recorded_conditions
from secondcast.storage_schemas.reader import Cache
from secondcast.trainer.cost.stage_cost import costs_of
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.loop import Trainer
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.settings import TrainFlags, TrainSettings
from secondcast.trainer.training_set import TrainingSet
from tests.simulated_cuda import flux
from tests.simulated_cuda.device import CUDA, SimulatedCuda
from tests.simulated_cuda.measured import Measured, Planned

STUDENT = "base"
BATCH_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """Options of a run; those that are not given are the defaults of `secondcast train`, at batch size 4."""

    name: str
    pixels: int = 512
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> TrainSettings:
        """Settings of one step."""
        return TrainFlags.from_flags(student=STUDENT, steps=1, **{"batch_size": BATCH_SIZE} | self.flags).settings()

    def planned(self) -> Planned:
        """The memory that the product calculates."""
        costs = costs_of({"cache": flux.manifest_of(self.pixels)}, STUDENT)
        return Planned.of(costs.memory(self.settings))


RECOMPUTED = {"activation_checkpointing": 1}
# Rows that share a transformer follow each other.
TRAINING = (
    TrainingRow(name="table"),
    TrainingRow(name="checkpointed", flags=RECOMPUTED),
    TrainingRow(name="checkpointed, batch 1", flags=RECOMPUTED | {"batch_size": 1}),
    TrainingRow(name="checkpointed, 1024 px", pixels=1024, flags=RECOMPUTED),
    TrainingRow(name="every 4th block checkpointed, 1024 px", pixels=1024, flags={"activation_checkpointing": 4}),
    TrainingRow(name="modulation on the GPU", flags={"modulation": "gpu"}),
)
STREAMED = (
    TrainingRow(name="28 blocks on the GPU", flags=RECOMPUTED | {"gpu_blocks": 28}),
    TrainingRow(name="no block on the GPU", flags=RECOMPUTED | {"gpu_blocks": 0}),
    TrainingRow(
        name="no block on the GPU, 1024 px, in 2 parts",
        pixels=1024,
        flags=RECOMPUTED | {"gpu_blocks": 0, "grad_accum_steps": 2},
    ),
    TrainingRow(name="int8", flags=RECOMPUTED | {"quantize": "int8"}),
)


class Trainings:
    """Runs rows one after the other in one process; `folder` holds their caches."""

    def __init__(self, device: SimulatedCuda, folder: Path) -> None:
        self._device, self._folder = device, folder
        self._caches: dict[int, Cache] = {}
        self._held: tuple[Any, Backbone] | None = None

    def run(self, row: TrainingRow, during: Callable[[Trainer], AbstractContextManager[Any]] | None = None) -> Measured:
        """One optimizer step with the moments of earlier ones; during: a context around it."""
        with self._device:
            trainer = self._trainer(row)
            _make_moments(trainer)
            self._device.queue.waits.clear()
            with during(trainer) if during else nullcontext():
                trainer.timed_steps()
            return self._device.measured()

    def _trainer(self, row: TrainingRow) -> Trainer:
        settings, cache = row.settings, self._cache(row.pixels)
        manifest = cache.manifest
        objective = Objective(
            settings=settings, backbones=[self._backbone(row, cache)], context_ID=None, sigmas=[manifest.sampling.sigmas]
        )
        return Trainer(
            self._folder,
            settings,
            [TrainingCache(name="cache", cache=cache, training_set=TrainingSet.of(cache))],
            objective,
            flux.student(self._device.without_data, STUDENT, manifest),
            CUDA,
            autocast=True,
        )

    def _cache(self, pixels: int) -> Cache:
        if pixels not in self._caches:
            folder = self._folder / f"cache-{pixels}"
            self._caches[pixels] = flux.cache_of(folder, flux.manifest_of(pixels, prompts=BATCH_SIZE))
        return self._caches[pixels]

    def _backbone(self, row: TrainingRow, cache: Cache) -> Backbone:
        """The transformer of this row, the last one if it only differs in what is recomputed."""
        options, manifest = row.settings.memory, cache.manifest
        key = row.pixels, options.modulation, options.gpu_blocks, options.quantize
        if self._held is None or self._held[0] != key:
            self._held = None
            backbone = Backbone.holding(
                flux.transformer(self._device.without_data, manifest),
                recorded_geometry(manifest.sampling),
                text_length=manifest.teacher.text_length,
                device=CUDA,
                options=options,
                conditions=recorded_conditions([manifest], batch_rows=row.settings.replay_rows),
            )
            self._held = key, backbone
        backbone = self._held[1]
        if options.gpu_blocks is None:
            activation_checkpointing(backbone.transformer, options.activation_checkpointing)
        return backbone


def _make_moments(trainer: Trainer) -> None:
    for parameter in trainer.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
