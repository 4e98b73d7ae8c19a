"""Creates the manifest of a build from its settings and the teacher."""

from collections.abc import Sequence
from typing import Any

import secondcast
from secondcast.cache_builder.settings import OutlineSettings, ResolvedSettings
from secondcast.models.families.flow_match import PlannedSchedule
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.schema.manifest import NEGATIVE_TEXT, Manifest, PromptSet, Segment
from secondcast.storage_schemas.schema.prompts import Prompt
from secondcast.storage_schemas.schema.recording import ArrayStorage, Sampling, Storage, TextRecording
from secondcast.storage_schemas.schema.segments import added_segments
from secondcast.storage_schemas.writer import prompt_set_fields

CREATED_BY = f"secondcast {secondcast.__version__}"


def plan_manifest(
    settings: OutlineSettings,
    teacher: TeacherFolder,
    prompts: list[Prompt],
    samples_per_prompt: Sequence[int] | None = None,
) -> Manifest:
    """The manifest of the requested cache. Hashes the teacher's weights.

    prompts: the negative prompt first, if the cache has one (see has_negative).
    samples_per_prompt: number of samples of each other prompt; None for that of the settings.
    """
    return _manifest(settings, teacher, prompt_set_fields(prompts), samples_per_prompt, hashed=True)


def outline_manifest(
    settings: OutlineSettings,
    teacher: TeacherFolder,
    *,
    prompt_count: int,
    samples_per_prompt: Sequence[int] | None = None,
) -> Manifest:
    """The shapes and counts of that manifest for planning, without reading prompts or hashing weights."""
    unknown = {"held_out": 0, "sources": {}, "ids": "", "bytes": 0, "xxh3_128": ""}
    count = prompt_count + has_negative(settings, teacher)
    return _manifest(settings, teacher, {"count": count, **unknown}, samples_per_prompt, hashed=False)


def has_negative(settings: OutlineSettings, teacher: TeacherFolder) -> bool:
    """Whether the first prompt of a cache is the negative one of classifier-free guidance."""
    return teacher.family.guidance_rule == "cfg" and not settings.text_only


def _segments(
    settings: OutlineSettings, prompt_count: int, samples_per_prompt: Sequence[int] | None, *, negative: bool
) -> tuple[Segment, ...]:
    if negative:
        only = Segment(first_prompt=0, prompts=1, first_sample=0, samples_per_prompt=0, shard_size=settings.shard_size)
        others = _segments(settings, prompt_count - 1, samples_per_prompt, negative=False)
        return (only, *(other.model_copy(update={"first_prompt": other.first_prompt + 1}) for other in others))
    if not settings.text_only and samples_per_prompt is not None and len(set(samples_per_prompt)) > 1:
        bits = {count: (1 << count) - 1 for count in set(samples_per_prompt)}
        wanted = {number: bits[count] for number, count in enumerate(samples_per_prompt)}
        return added_segments({}, wanted, shard_size=settings.shard_size)
    samples = samples_per_prompt[0] if samples_per_prompt else settings.samples_per_prompt
    return (
        Segment(
            first_prompt=0,
            prompts=prompt_count,
            first_sample=0,
            samples_per_prompt=0 if settings.text_only else samples,
            shard_size=settings.shard_size,
        ),
    )


def _manifest(
    settings: OutlineSettings,
    teacher: TeacherFolder,
    prompt_set: dict[str, Any],
    samples_per_prompt: Sequence[int] | None,
    *,
    hashed: bool,
) -> Manifest:
    text_length = teacher.checked_text_length(settings.text_length)
    negative = has_negative(settings, teacher)
    segments = _segments(settings, prompt_set["count"], samples_per_prompt, negative=negative)
    resolved = settings.resolved(teacher.family)
    return Manifest(
        source=teacher.pinned_source,
        created_by=CREATED_BY,
        teacher=teacher.identity(text_length=text_length, pooled=resolved.pooled, hashed=hashed),
        sampling=None if settings.text_only else _sampling(settings, resolved, teacher, planned=not hashed),
        text=_text_recording(settings) if settings.text_only else None,
        prompts=PromptSet(segments=segments, **prompt_set),
        metadata={},
    )


def _text_recording(settings: OutlineSettings) -> TextRecording:
    storage = ArrayStorage(format=settings.format, compression=settings.compression)
    return TextRecording(dtype=settings.dtype, storage=storage)


def _schedule(
    settings: OutlineSettings, teacher: TeacherFolder, image_tokens: int, *, planned: bool
) -> PlannedSchedule:
    """Sigmas and timesteps of a cache."""
    family, config = teacher.family, teacher.config("scheduler")
    name, steps, dtype = settings.schedule, settings.steps, settings.dtype
    if planned:
        return family.planned_schedule(name, config, steps=steps, image_tokens=image_tokens, dtype=dtype)
    # It imports torch, which a plan does not need.
    from secondcast.models.schedule import DTYPES

    schedule = family.schedule(name, config, steps=steps, image_tokens=image_tokens, dtype=DTYPES[dtype])
    return schedule.sigmas, schedule.timesteps


def _sampling(
    settings: OutlineSettings, resolved: ResolvedSettings, teacher: TeacherFolder, *, planned: bool
) -> Sampling:
    family, geometry = teacher.family, teacher.geometry(settings)
    sigmas, timesteps = _schedule(settings, teacher, geometry.image_tokens, planned=planned)
    return Sampling(
        height=geometry.height,
        width=geometry.width,
        image_tokens=geometry.image_tokens,
        channels=geometry.channels,
        steps=settings.steps,
        schedule=settings.schedule,
        sigmas=sigmas,
        timesteps=timesteps,
        guidance=resolved.guidance if family.takes_guidance(teacher.config("transformer")) else None,
        seed=settings.seed,
        noise="philox-float32",
        dtype=settings.dtype,
        latent_rule=family.latent_rule,
        quantize=settings.quantize,
        scheduler=teacher.config("scheduler") if family.latent_rule == "scheduler" else None,
        negative_prompt=NEGATIVE_TEXT if has_negative(settings, teacher) else None,
        storage=Storage(
            format=settings.format,
            compression=settings.compression,
            latents=resolved.latents,
            embeddings="stored" if settings.store_embeddings else "none",
        ),
    )
