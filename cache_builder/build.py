"""Phase 1: prompts -> embeddings -> text encoder released -> trajectories -> shards."""

from dataclasses import dataclass

import torch

from cache_builder.prompt_files import read_prompts
from cache_builder.sample_stage import run_sample_stage
from cache_builder.settings import BuildSettings, build_geometry, plan_manifest
from cache_builder.text_stage import run_text_stage, tokenised_prompts
from models.backbone import FluxBackbone
from models.schedule import DTYPES
from models.teacher_folder import TeacherFolder
from storage_schemas.extension import extend
from storage_schemas.folders import Location, open_folder
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
    manifest = plan_manifest(settings, teacher, prompts)
    progress.say(
        f"{len(prompts)} distinct prompts x {settings.replicas} replicas = {len(prompts) * settings.replicas} "
        f"trajectories ({read.empty} empty and {read.repeated} repeated lines skipped)"
    )
    if cut:
        progress.say(
            f"{len(cut)} prompts are longer than {manifest.teacher.text_length} tokens and were cut, "
            f"the first: {cut[0]!r}"
        )
    if settings.extend:
        return extend(open_folder(location), manifest, prompts, teacher.tokenizer_files(), progress)
    return CacheWriter.create_or_resume(location, manifest, prompts, teacher.tokenizer_files())
