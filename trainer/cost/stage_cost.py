"""Calculated costs of a run: FLOPs of a step, GPU and host memory, copies of streamed blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from secondcast.models.cost.cards import COPY_BYTES_PER_SECOND
from secondcast.models.cost.counted import backbone_cost, student_cost
from secondcast.models.cost.gpu_memory import (
    GpuMemory,
    WeightBytes,
    held_weights,
    table_rows,
    training_host_bytes,
    training_memory,
)
from secondcast.models.cost.network_costs import BackboneCost, TextEncoderCost
from secondcast.models.cost.shapes import CallShapes
from secondcast.storage_schemas.schema.fields import DTYPES
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.trainer.cost.step_flops import step_flops
from secondcast.trainer.data.lru_cache import AHEAD_PART, POOL_BYTES
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Inputs of the cost calculation: caches by name, the backbone at the size of each cache, the student.

    ranks: number of processes that split each batch; bytes are per process.
    local_ranks: number of those processes on one machine.
    gpu_bytes: total memory of a GPU; None without a GPU.
    """

    manifests: Mapping[str, Manifest]
    backbones: Mapping[str, BackboneCost]
    student: TextEncoderCost
    ranks: int = 1
    local_ranks: int = 1
    gpu_bytes: float | None = None

    def names(self, stage: Stage) -> list[str]:
        """Names of the caches whose rows the loss of a stage is computed on."""
        return [name for name, manifest in self.manifests.items() if stage.trains_on(name, is_text=manifest.is_text)]

    @property
    def blocks(self) -> int:
        """Number of blocks of the backbone."""
        return next(iter(self.backbones.values())).blocks

    def loaded(self, settings: TrainSettings, name: str | None = None) -> BackboneCost:
        """The part of the backbone that a run loads, at the size of a cache; None: of any."""
        backbone = next(iter(self.backbones.values())) if name is None else self.backbones[name]
        return backbone if settings.loaded_blocks is None else backbone.first(settings.loaded_blocks)

    def step_flops(self, settings: TrainSettings, stage: Stage) -> float:
        """FLOPs of an optimizer step of a stage, averaged over its caches by their shares."""
        caches = {
            name: (manifest, Layout(manifest.prompts.segments).rows[1].items)
            for name, manifest in self.manifests.items()
        }
        return step_flops(
            stage,
            settings.memory,
            caches,
            student_flops=self.student.forward_flops,
            text_length=next(iter(self.manifests.values())).teacher.text_length,
            loaded_blocks=settings.loaded_blocks,
        )

    def step_copy_seconds(self, settings: TrainSettings, stage: Stage) -> float:
        """Seconds of a step's copies of streamed blocks at the assumed rate; they overlap with computation."""
        if not stage.replays:
            return 0.0
        run = self.blocks if stage.blocks is None else stage.blocks
        copied = sum(size for block, size in self._held(settings).streamed_bytes.items() if block < run)
        # One copy for the forward and one for the backward pass of each part of the batch; before them the teacher's.
        passes = 2 if stage.predicts else 3
        return passes * stage.grad_accum_steps * copied / COPY_BYTES_PER_SECOND

    def memory(self, settings: TrainSettings) -> GpuMemory:
        """GPU memory of the stage that needs most; the weights are loaded in all stages."""
        found = [self.stage_memory(settings, stage) for stage in settings.stages]
        return max(found, key=lambda memory: memory.total_bytes)

    def stage_memory(self, settings: TrainSettings, stage: Stage) -> GpuMemory:
        """GPU memory of a stage with its largest cache; includes the backbone that a later stage needs."""
        replays = stage.replays
        found = [
            training_memory(
                self.loaded(settings, name) if replays else None,
                self.student,
                options=settings.memory,
                dtype_bytes=self._dtype_bytes(settings),
                batch_size=self.rows(stage),
                timesteps_per_sample=stage.timesteps_per_sample,
                table_rows=self.table_rows,
                gpu_bytes=self.gpu_bytes,
                averaged=settings.ema_decay is not None,
                # Buckets of several processes stay allocated between steps.
                accumulates=stage.grad_accum_steps > 1 or self.ranks > 1,
                depth=stage.blocks,
            )
            for name in (self.names(stage) if replays else self.names(stage)[:1])
        ]
        largest = max(found, key=lambda memory: memory.total_bytes)
        return replace(largest, weights_bytes=self._held(settings).device_bytes)

    def rows(self, stage: Stage) -> int:
        """Rows of a stage in one forward pass of each process."""
        return max(1, stage.batch_size // (stage.grad_accum_steps * self.ranks))

    @property
    def table_rows(self) -> int | None:
        """Rows of the modulation table of all caches; None if no table is possible."""
        return table_rows(*(manifest for manifest in self.manifests.values() if not manifest.is_text))

    def pinned_bytes(self, settings: TrainSettings) -> int:
        """Pinned host memory of streamed blocks."""
        return self._held(settings).pinned_bytes

    def host_bytes(self, settings: TrainSettings) -> int:
        """Host memory of one process."""
        pinned = POOL_BYTES // AHEAD_PART + self.pinned_bytes(settings)
        kept = self._held(settings).host_bytes
        return training_host_bytes(pool_bytes=POOL_BYTES, pinned_bytes=pinned, weights_bytes=kept)

    def _held(self, settings: TrainSettings) -> WeightBytes:
        if not settings.replays:
            return WeightBytes()
        return held_weights(
            self.loaded(settings),
            settings.memory,
            dtype_bytes=self._dtype_bytes(settings),
            table_rows=self.table_rows,
            gpu_bytes=self.gpu_bytes,
        )

    def _dtype_bytes(self, settings: TrainSettings) -> int:
        recorded = next(iter(self.manifests.values())).dtype
        return DTYPES[recorded if settings.backbone_dtype == "cache" else settings.backbone_dtype].itemsize


def costs_of(
    manifests: Mapping[str, Manifest],
    student_source: str | dict[str, Any],
    *,
    projection_rank: int | None = None,
    ranks: int = 1,
    local_ranks: int = 1,
    gpu_bytes: float | None = None,
) -> Costs:
    """The costs of a run on (planned) caches, from configuration files alone; the student as for student_cost."""
    # The first one states what all share; text caches have no transformer's calls.
    manifests = dict(sorted(manifests.items(), key=lambda item: item[1].is_text))
    backbones = {
        name: backbone_cost(CallShapes.of(manifest)) for name, manifest in manifests.items() if not manifest.is_text
    }
    student = student_cost(student_source, next(iter(manifests.values())), projection_rank)
    return Costs(
        manifests=manifests,
        backbones=backbones,
        student=student,
        ranks=ranks,
        local_ranks=local_ranks,
        gpu_bytes=gpu_bytes,
    )
