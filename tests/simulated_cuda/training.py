"""Optimizer steps of FLUX.1-dev on the simulated device, as `secondcast train` computes them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from secondcast.models.backbone import Backbone
from secondcast.models.memory.checkpointing import activation_checkpointing
from secondcast.models.memory.modulation_table import recorded_conditions
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.cost.stage_cost import Costs, costs_of
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.loop import Trainer
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.settings import TrainFlags, TrainSettings
from secondcast.trainer.training_set import TrainingSet
from tests.simulated_cuda import flux
from tests.simulated_cuda.device import CUDA
from tests.simulated_cuda.measured import Measured, Planned
from tests.simulated_cuda.session import Session

STUDENT = "base"
BATCH_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class TrainingRow:
    """Options of a run; those that are not given are the defaults of `secondcast train`, at batch size 4.

    fault: a context in which the product is broken.
    """

    name: str
    pixels: int = 512
    flags: dict[str, Any] = field(default_factory=dict)
    fault: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def settings(self) -> TrainSettings:
        """Settings of one step."""
        return TrainFlags.from_flags(student=STUDENT, steps=1, **{"batch_size": BATCH_SIZE} | self.flags).settings()

    def planned(self) -> Planned:
        """The memory that the product calculates."""
        return Planned.of(_costs(self.pixels).memory(self.settings))

    def run(self, session: Session) -> Measured:
        """One optimizer step, with the moments of earlier ones."""
        with session.device as device:
            trainer = _trainer(self, session)
            _make_moments(trainer)
            device.queue.waits.clear()
            with self.fault():
                trainer.timed_steps()
            return device.measured()


@cache
def _costs(pixels: int) -> Costs:
    return costs_of({"cache": flux.manifest_of(pixels)}, STUDENT)


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


def _trainer(row: TrainingRow, session: Session) -> Trainer:
    settings = row.settings
    cache = session.cache(f"{row.pixels} px", flux.manifest_of(row.pixels, prompts=BATCH_SIZE))
    manifest = cache.manifest
    return Trainer(
        session.folder,
        settings,
        [TrainingCache(name="cache", cache=cache, training_set=TrainingSet.of(cache))],
        Objective(
            settings=settings,
            backbones=[_backbone(row, settings.memory, manifest, session)],
            context_ID=None,
            sigmas=[manifest.sampling.sigmas],
        ),
        flux.student(session.device.without_data, STUDENT, manifest),
        CUDA,
        autocast=True,
    )


def _backbone(row: TrainingRow, options: MemoryOptions, manifest: Manifest, session: Session) -> Backbone:
    """The transformer of a row, that of the last one if they only differ in what is recomputed."""
    conditions = recorded_conditions([manifest], batch_rows=1)
    assert conditions is not None
    # All rows of the table in one call, to save time.
    conditions = replace(conditions, batch_rows=len(conditions.pairs))
    key = row.pixels, options.modulation, options.gpu_blocks, options.quantize
    backbone = session.backbone(key, manifest, options, conditions)
    if options.gpu_blocks is None:
        activation_checkpointing(backbone.transformer, options.activation_checkpointing)
    return backbone


def _make_moments(trainer: Trainer) -> None:
    for parameter in trainer.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
