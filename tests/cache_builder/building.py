"""Builds for tests, by the real builder."""

from pathlib import Path
from typing import Any

import torch

from secondcast.cache_builder.build import BuildResult, OneProcess, build
from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.worker import WorkerConfig
from secondcast.models.teacher.folder import build_parts, find_teacher
from secondcast.storage_schemas.io.folders import Location
from secondcast.storage_schemas.progress import Progress, Silent


def build_settings(prompts: Path, **flags: Any) -> BuildSettings:
    return BuildSettings.from_flags(prompts=(prompts,), **{"steps": 4, "shard_size": 3, "batch_size": 2, **flags})


CPU = torch.device("cpu")


def build_cache(
    path: Location,
    teacher: Path | str,
    prompts: Path,
    *,
    progress: Progress | None = None,
    config: WorkerConfig | None = None,
    device: torch.device | None = CPU,
    **flags: Any,
) -> BuildResult:
    settings = build_settings(prompts, **flags)
    found = find_teacher(str(teacher), build_parts(settings.pooled))
    return build(path, settings, found, device, progress or Silent(), None if config is None else OneProcess(config))


def data_files(path: Path) -> dict[str, bytes]:
    """All files of a cache but the commit records: only those hold times and provenance."""
    return {
        str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and "commits" not in p.parts
    }
