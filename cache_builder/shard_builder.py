"""Builds shards with the networks of a teacher, of which one at a time is in memory."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from secondcast.cache_builder.sample_stage import run_sample_stage
from secondcast.cache_builder.teacher_models import TeacherModels
from secondcast.cache_builder.text_stage import run_text_stage
from secondcast.cache_builder.worker import WorkerConfig
from secondcast.models.backbone import Backbone
from secondcast.models.memory.peak import PeakMemory, peak_memory
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.progress import Progress, size_text
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.writer import CacheWriter


class ShardBuilder:
    """Makes and commits the shards that it is given. `peaks`: peak memory of each stage so far."""

    def __init__(
        self,
        cache: CacheWriter,
        teacher: TeacherFolder,
        config: WorkerConfig,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._cache, self._config = cache, config
        self._device, self._progress = device, progress
        self._models = TeacherModels(
            cache.manifest, teacher, device, memory=config.memory, batch_size=config.batch_size, progress=progress
        )
        self.peaks: dict[str, PeakMemory] = {}

    def encode(self, shards: Sequence[ShardRange]) -> None:
        """Encode the prompts of embedding shards with the text encoder, which stays loaded until `release`."""
        if shards:
            run_text_stage(self._cache, self._models.text_encoder(), shards, **self._counts("embeddings"))
            self._keep_peak("text")

    def sample(self, shards: Sequence[ShardRange]) -> None:
        """Sample the trajectories of shards whose embeddings are committed; the text encoder is released before."""
        if shards:
            run_sample_stage(self._cache, self._embeddings, self.backbone(), shards, **self._counts("trajectories"))
            self._keep_peak("sample")

    def backbone(self) -> Backbone:
        """The transformer; it stays loaded until `release`."""
        return self._models.backbone(self._config.attention_backend)

    def release(self) -> None:
        """Free the memory of the networks."""
        self._models.release()

    @cached_property
    def _embeddings(self) -> Cache:
        # Opened once: that reads all records, of which a large cache on an object store has thousands.
        return Cache.open(str(self._cache.folder))

    def _counts(self, kind: Kind) -> dict[str, Any]:
        """The rows of this worker, how many of them are committed, and the batch size."""
        layout, worker = self._cache.layout, self._config.worker
        planned = layout.trajectories if kind == "trajectories" else layout.embeddings
        share, left = (
            sum(shard.rows for shard in worker.owned(shards)) for shards in (planned, self._cache.missing(kind))
        )
        return {
            "share": share,
            "done": share - left,
            "batch_size": self._config.batch_size,
            "progress": self._progress,
        }

    def _keep_peak(self, stage: str) -> None:
        self.peaks[stage] = peak_memory(self._device)

    def report_peak(self, stage: str) -> None:
        """Print the peak memory of a stage, if it ran here."""
        if (peak := self.peaks.get(stage)) is not None:
            gpu = f", {size_text(peak.gpu_bytes)} of the GPU" if peak.gpu_bytes is not None else ""
            self._progress.say(f"{stage}: at most {size_text(peak.host_bytes)} of host memory{gpu}")
