"""Phase 1: prompts -> embeddings -> text encoder released -> trajectories -> shards."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cache_builder.prompt_files import read_prompts
from cache_builder.prompt_lengths import prompt_lengths
from cache_builder.sample_stage import run_sample_stage
from cache_builder.settings import BuildSettings, build_geometry, plan_manifest
from cache_builder.text_stage import run_text_stage, tokenised_prompts
from models.backbone import FluxBackbone
from models.schedule import DTYPES
from models.teacher_folder import TeacherFolder
from storage_schemas.folders import Location
from storage_schemas.progress import Progress
from storage_schemas.writer import CacheWriter


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a finished build holds."""

    location: str
    prompts: int
    trajectories: int
    bytes: int


def build(
    location: Location, settings: BuildSettings, teacher: TeacherFolder, device: torch.device, progress: Progress
) -> BuildResult:
    """Build a cache, or go on with it; every committed shard stays, whatever happens."""
    writer = _open_writer(location, settings, teacher, progress)
    # Embeddings that are not kept are dropped once every trajectory is there: they are not missing then.
    if settings.embeddings == "stored" or writer.missing("trajectories"):
        run_text_stage(writer, teacher, batch_size=settings.batch_size, device=device, progress=progress)
    if writer.missing("trajectories"):
        backbone = FluxBackbone.load(
            teacher.path,
            build_geometry(settings, teacher),
            text_length=writer.manifest.teacher.text_length,
            dtype=DTYPES[settings.dtype],
            device=device,
        )
        run_sample_stage(writer, backbone, batch_size=settings.batch_size, progress=progress)
    writer.finish()
    records = writer.records().values()
    return BuildResult(
        location=str(writer.folder),
        prompts=len(writer.prompts),
        trajectories=sum(record.rows for record in records if record.kind == "trajectories"),
        bytes=sum(file.bytes for record in records for file in record.files),
    )


def _open_writer(
    location: Location, settings: BuildSettings, teacher: TeacherFolder, progress: Progress
) -> CacheWriter:
    read = read_prompts(settings.prompts, limit=settings.limit)
    prompts, cut = tokenised_prompts(read.texts, teacher)
    replicas = [settings.replicas * text.repeat for text in read.texts]
    manifest = plan_manifest(settings, teacher, prompts, replicas)
    progress.say(f"{_counted(replicas)} trajectories ({read.skipped_text()})")
    if cut:
        progress.say(prompt_lengths(cut, teacher).cut_text())
    return CacheWriter.create_or_resume(location, manifest, prompts, teacher.tokenizer_files())


def _counted(replicas: Sequence[int]) -> str:
    if len(set(replicas)) == 1:
        return f"{len(replicas)} distinct prompts x {replicas[0]} replicas = {sum(replicas)}"
    return f"{len(replicas)} distinct prompts, {sum(replicas)}"
