"""`secondcast.build`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secondcast.api.names import resolve_teacher
from secondcast.api.options import display, options_of
from secondcast.cache_builder.prompts.sources import PromptSource
from secondcast.cache_builder.settings import BuildSettings
from secondcast.cache_builder.workers.launcher import BuildLauncher
from secondcast.models.teacher.folder import build_parts
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache

Source = str | Path | PromptSource


def build(
    cache: str | Path,
    *,
    teacher: str | Path,
    prompts: Source | Sequence[Source],
    revision: str | None = None,
    device: str = "auto",
    progress: bool | Progress = False,
    **options: Any,
) -> Cache:
    """Record the teacher's trajectory for every prompt, as `secondcast build` does; the same call again resumes.

    cache: folder of the cache, or s3://bucket/prefix.
    teacher: pocket, a folder of a diffusers pipeline, or a hub name.
    prompts: sources of prompts, as for --prompts: a file, or hf:NAME; one or several.
    revision: of the hub repository.
    device: auto (a GPU if available), cpu, cuda, or for example cuda:1.
    progress: True shows progress on stderr.
    options: all others of `secondcast build` by name, such as steps=20; see docs/options.md.

    Raises SecondcastError: SettingsError for an unknown or invalid option, PromptsError, TeacherError,
    SettingsMismatchError for a cache that was built with other settings.
    """
    listed = (prompts,) if isinstance(prompts, Source) else tuple(prompts)
    of_settings, of_launcher = options_of("build", options, BuildSettings, BuildLauncher)
    settings = BuildSettings.from_flags(prompts=listed, **of_settings)
    launcher = BuildLauncher.from_flags(**of_launcher)
    torch_device = launcher.own_device(device)
    found = resolve_teacher(str(teacher), build_parts(settings.pooled), revision)
    launcher.build(str(cache), settings, found, torch_device, display(progress), device)
    return Cache.open(str(cache))
