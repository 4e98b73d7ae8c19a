"""What precedes a build: the prompts are read and counted, the cache is created or opened, the disk is checked."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from secondcast.cache_builder.opening.disk import check_disk
from secondcast.cache_builder.opening.new_manifest import has_negative, plan_manifest
from secondcast.cache_builder.prompts.files import read_prompts
from secondcast.cache_builder.prompts.lengths import prompt_lengths
from secondcast.cache_builder.provenance import changed_provenance, provenance
from secondcast.cache_builder.settings import BuildSettings, placed
from secondcast.cache_builder.teacher_models import placement
from secondcast.cache_builder.text_stage import negative_prompt, tokenised_prompts
from secondcast.models.attention import check_attention
from secondcast.models.memory.quantized import check_quantizer
from secondcast.models.memory.streaming import check_placement
from secondcast.models.schedule import DTYPES
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.folders import Location, open_folder
from secondcast.storage_schemas.maintenance.extend import extend
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.storage_schemas.schema.commits import Kind
from secondcast.storage_schemas.schema.prompts import Prompt
from secondcast.storage_schemas.writer import CacheWriter


def open_build(
    location: Location,
    settings: BuildSettings,
    teacher: TeacherFolder,
    device: torch.device | None,
    progress: Progress,
    *,
    samples: bool = True,
) -> CacheWriter:
    """Create the cache of a build, or open it to resume; prints the number of trajectories first.

    device: where this process computes; None where workers on other machines do, which check their own.
    samples: whether it samples trajectories, whose transformer has to fit.

    Raises SettingsError or MissingExtraError, before anything is written, for what cannot be computed here.
    """
    family = teacher.family
    options = placed(settings.memory, settings.quantize, settings.resolved(family).pooled)
    check_placement(options, family.anatomy, teacher.config("transformer"))
    if device is not None and not settings.text_only:
        check_quantizer(settings.quantize)
        dtype = DTYPES[settings.dtype]
        check_attention(settings.attention_backend, teacher, dtype=dtype, device=device)
    cache = _create_or_open(location, settings, teacher, device if samples else None, progress)
    if device is not None:
        _report_changes(cache, settings, device, progress)
    return cache


def _create_or_open(
    location: Location,
    settings: BuildSettings,
    teacher: TeacherFolder,
    device: torch.device | None,
    progress: Progress,
) -> CacheWriter:
    read = read_prompts(settings.prompts, limit=settings.limit)
    if settings.text_only and any(text.repeat > 1 for text in read.texts):
        raise SettingsError(
            "--prompts has :repeat= with --text-only: it multiplies the samples of a prompt, of which a text cache has "
            "none; remove one of them"
        )
    prompts, cut = tokenised_prompts(read.texts, teacher, text_length=settings.text_length)
    samples = [0 if settings.text_only else settings.samples_per_prompt * text.repeat for text in read.texts]
    if has_negative(settings, teacher):
        prompts = [negative_prompt(teacher, text_length=settings.text_length), *prompts]
    manifest = plan_manifest(settings, teacher, prompts, samples)
    if device is not None and not settings.text_only:
        placement(manifest, settings.memory, settings.batch_size, device)
    progress.say(f"{_product(samples)} ({read.skipped_text()})")
    if teacher.family.text_cleaning:
        _report_cleaned_to_nothing(prompts[-len(samples) :], teacher, progress)
    if cut:
        progress.say(prompt_lengths(cut, teacher, text_length=manifest.teacher.text_length).cut_text())
    if settings.extend:
        cache = extend(open_folder(location), manifest, prompts, teacher.tokenizer_files(), progress)
        check_disk(location, cache.manifest, progress, skip_disk_check=settings.skip_disk_check)
        return cache
    # Before the cache is created: its settings can still be changed then.
    check_disk(location, manifest, progress, skip_disk_check=settings.skip_disk_check)
    return CacheWriter.create_or_resume(location, manifest, prompts, teacher.tokenizer_files())


def _report_cleaned_to_nothing(prompts: Sequence[Prompt], teacher: TeacherFolder, progress: Progress) -> None:
    nothing = negative_prompt(teacher).token_ids
    empty = sum(prompt.token_ids == nothing for prompt in prompts)
    if empty:
        progress.say(
            f"{counted(empty, 'prompt')} of which the pipeline's cleaning leaves nothing (links, file names): "
            f"recorded like the empty one"
        )


def _product(samples: Sequence[int]) -> str:
    prompts, trajectories = counted(len(samples), "distinct prompt"), counted(sum(samples), "trajectory")
    if not any(samples):
        return f"{prompts}, no trajectories"
    if len(set(samples)) == 1:
        return f"{prompts} x {counted(samples[0], 'sample')} = {trajectories}"
    return f"{prompts}, {trajectories}"


def _report_changes(cache: CacheWriter, settings: BuildSettings, device: torch.device, progress: Progress) -> None:
    """Report in what the machine and its settings differ from those of the committed shards."""
    here = partial(provenance, device=device, batch_size=settings.batch_size)
    ours: dict[Kind, dict[str, Any]] = {
        "embeddings": here(),
        "trajectories": here(attention=settings.attention_backend, quantize=settings.quantize),
    }
    for line in changed_provenance(cache, ours):
        progress.say(line)
