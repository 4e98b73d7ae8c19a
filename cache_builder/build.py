"""Phase 1: prompts -> embeddings -> text encoder released -> trajectories -> shards."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from pydantic import Field

from secondcast.cache_builder.disk import check_disk
from secondcast.cache_builder.new_manifest import plan_manifest
from secondcast.cache_builder.prompts.files import read_prompts
from secondcast.cache_builder.prompts.lengths import prompt_lengths
from secondcast.cache_builder.provenance import changed_provenance, provenance
from secondcast.cache_builder.sample_stage import run_sample_stage
from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.teacher_models import TeacherModels
from secondcast.cache_builder.text_stage import run_text_stage, tokenised_prompts
from secondcast.cache_builder.waiting import needed_embeddings, wait_for_embeddings
from secondcast.cache_builder.worker import Stage, Worker
from secondcast.models.attention import check_attention
from secondcast.models.backbone import FluxBackbone
from secondcast.models.memory.peak import PeakMemory, peak_memory
from secondcast.models.memory.quantized import check_quantizer
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.io.folders import Location, open_folder
from secondcast.storage_schemas.maintenance.extend import extend
from secondcast.storage_schemas.progress import Progress, counted, size_text
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.schema.manifest import Record
from secondcast.storage_schemas.writer import CacheWriter


class WorkerConfig(Record):
    """Which part of a build this process does; it shapes no byte of the cache.

    wait_seconds: how long to wait for embeddings that others make, counted from the last new one.
    """

    stage: Stage = "all"
    worker: Worker = Worker()
    wait_seconds: float = Field(default=0.0, ge=0)
    batch_size: int = Field(ge=1)
    attention_backend: str | None = None


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What the cache holds now, and the peaks of the stages that ran here."""

    location: str
    prompts: int
    embeddings: int
    trajectories: int
    planned: int
    bytes: int
    peaks: dict[str, PeakMemory]

    @property
    def finished(self) -> bool:
        """Whether every trajectory is there."""
        return self.trajectories == self.planned


def build(
    location: Location,
    settings: BuildSettings,
    teacher: TeacherFolder,
    device: torch.device,
    progress: Progress,
    share: WorkerConfig | None = None,
) -> BuildResult:
    """Build a cache, or this worker's share of it, or go on with it; every committed shard stays, whatever happens."""
    check_device(settings, teacher, device)
    writer = open_writer(location, settings, teacher, progress)
    say_what_changed(writer, settings, device, progress)
    share = share or WorkerConfig(batch_size=settings.batch_size, attention_backend=settings.attention_backend)
    stages = Stages(writer, teacher, share, device, progress)
    stages.run()
    return result_of(writer, stages.peaks)


class Stages:
    """The two stages of a build in one process. Of their networks only one is ever in memory."""

    def __init__(
        self, writer: CacheWriter, teacher: TeacherFolder, share: WorkerConfig, device: torch.device, progress: Progress
    ) -> None:
        self._writer, self._share = writer, share
        self._device, self._progress = device, progress
        self._networks = TeacherModels(writer.manifest, teacher, device)
        self.peaks: dict[str, PeakMemory] = {}

    def run(self) -> None:
        """The stages, and of them the shards, that this process was given."""
        worker = self._share.worker
        if self._share.stage != "sample" and (shards := worker.owned(self._writer.missing("embeddings"))):
            self.make("embeddings", shards)
            self._tell_peak("text")
        if self._share.stage != "text" and (shards := worker.owned(self._writer.missing("trajectories"))):
            self._networks.release()
            wait_for_embeddings(
                self._writer,
                needed_embeddings(self._writer, shards),
                # Who only samples has others that made the text, not one --worker per shard.
                worker if self._share.stage == "all" else Worker(),
                wait_seconds=self._share.wait_seconds,
                progress=self._progress,
            )
            self.make("trajectories", shards)
            self._tell_peak("sample")
        self._networks.release()

    def make(self, kind: Kind, shards: Sequence[ShardRange]) -> None:
        """Commit these shards, none of which is committed."""
        left = self._share.worker.owned(self._writer.missing(kind))
        done = self._share_of(kind) - sum(shard.rows for shard in left)
        how: dict[str, Any] = {
            "share": self._share_of(kind),
            "done": done,
            "batch_size": self._share.batch_size,
            "progress": self._progress,
        }
        if kind == "embeddings":
            run_text_stage(self._writer, self._networks.text_encoder(), shards, **how)
        else:
            run_sample_stage(self._writer, self._embeddings, self.backbone(), shards, **how)
        self.peaks["text" if kind == "embeddings" else "sample"] = peak_memory(self._device)

    @cached_property
    def _embeddings(self) -> Cache:
        """Opened once: that reads all records, of which a large cache on an object store has thousands."""
        return Cache.open(str(self._writer.folder))

    def backbone(self) -> FluxBackbone:
        """The transformer, once loaded kept; the text encoder is gone then."""
        return self._networks.backbone(self._share.attention_backend)

    def _share_of(self, kind: Kind) -> int:
        """Rows of all shards that are this worker's."""
        layout = self._writer.layout
        shards = layout.trajectories if kind == "trajectories" else layout.embeddings
        return sum(shard.rows for shard in self._share.worker.owned(shards))

    def _tell_peak(self, stage: str) -> None:
        peak = self.peaks[stage]
        gpu = f", {size_text(peak.gpu_bytes)} of the GPU" if peak.gpu_bytes is not None else ""
        self._progress.say(f"{stage}: at most {size_text(peak.host_bytes)} of host memory{gpu}")


def result_of(writer: CacheWriter, peaks: dict[str, PeakMemory]) -> BuildResult:
    """Finish the cache if every shard is there, and say what it holds."""
    writer.finish()
    records = writer.records()
    return BuildResult(
        location=str(writer.folder),
        prompts=len(writer.prompts),
        embeddings=records.rows("embeddings"),
        trajectories=records.rows("trajectories"),
        planned=len(writer.layout),
        bytes=records.bytes,
        peaks=peaks,
    )


def check_device(settings: BuildSettings, teacher: TeacherFolder, device: torch.device) -> None:
    """Raise SettingsError or MissingExtraError, before weights are read, unless attention and weights can be as asked for."""
    check_quantizer(settings.quantize)
    dtype = DTYPES[settings.dtype]
    check_attention(settings.attention_backend, teacher.config("transformer"), dtype=dtype, device=device)


def say_what_changed(writer: CacheWriter, settings: BuildSettings, device: torch.device, progress: Progress) -> None:
    """Say in what the machine and its settings differ from those of the shards that are there."""
    here = partial(provenance, device=device, batch_size=settings.batch_size)
    ours: dict[Kind, dict[str, Any]] = {
        "embeddings": here(),
        "trajectories": here(attention=settings.attention_backend, quantize=settings.quantize),
    }
    for line in changed_provenance(writer, ours):
        progress.say(line)


def open_writer(location: Location, settings: BuildSettings, teacher: TeacherFolder, progress: Progress) -> CacheWriter:
    """Create the cache that was asked for, or open it; says N first."""
    read = read_prompts(settings.prompts, limit=settings.limit)
    prompts, cut = tokenised_prompts(read.texts, teacher, text_length=settings.text_length)
    samples_per_prompt = [settings.samples_per_prompt * text.repeat for text in read.texts]
    manifest = plan_manifest(settings, teacher, prompts, samples_per_prompt)
    progress.say(f"{_product(samples_per_prompt)} ({read.skipped_text()})")
    if cut:
        progress.say(prompt_lengths(cut, teacher, text_length=manifest.teacher.text_length).cut_text())
    if settings.extend:
        writer = extend(open_folder(location), manifest, prompts, teacher.tokenizer_files(), progress)
        check_disk(location, writer.manifest, progress, skip_disk_check=settings.skip_disk_check)
        return writer
    # Before the cache is created: its settings can still be changed then.
    check_disk(location, manifest, progress, skip_disk_check=settings.skip_disk_check)
    return CacheWriter.create_or_resume(location, manifest, prompts, teacher.tokenizer_files())


def _product(samples_per_prompt: Sequence[int]) -> str:
    prompts, trajectories = (
        counted(len(samples_per_prompt), "distinct prompt"),
        counted(sum(samples_per_prompt), "trajectory"),
    )
    if len(set(samples_per_prompt)) == 1:
        return f"{prompts} x {counted(samples_per_prompt[0], 'sample')} = {trajectories}"
    return f"{prompts}, {trajectories}"
