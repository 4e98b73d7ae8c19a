"""Optimizer steps of FLUX.1-dev on the simulated device, as `secondcast train` computes them."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from secondcast.models.backbone import Backbone
from secondcast.models.memory.checkpointing import activation_checkpointing
from secondcast.models.memory.conditions import recorded_conditions
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.data.mixture import TrainingCache
from secondcast.trainer.loop import Trainer
from secondcast.trainer.losses.objective import Objective
from secondcast.trainer.training_set import TrainingSet
from tests.simulated_cuda.device.simulated import CUDA, Measured
from tests.simulated_cuda.runs import flux
from tests.simulated_cuda.runs.rows import TrainingRow, manifest_of
from tests.simulated_cuda.runs.session import Session


def train(row: TrainingRow, session: Session, fault: AbstractContextManager[Any] | None = None) -> Measured:
    """An optimizer step, with the moments of earlier ones. fault: a context in which the product is broken."""
    with session.device as device:
        trainer = _trainer(row, session)
        _make_moments(trainer)
        device.queue.waits.clear()
        with fault or nullcontext():
            trainer.timed_steps()
        return device.measured()


def _trainer(row: TrainingRow, session: Session) -> Trainer:
    settings = row.settings
    cache = session.cache(f"train-{row.pixels}", manifest_of(row.pixels))
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
        flux.student(session.device.without_data, manifest),
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
    trainer.train_state.optimizer.step()
    trainer.train_state.optimizer.zero_grad()
