"""What a build is asked to do, validated, and the manifest that follows from it and the teacher."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

import secondcast
from secondcast.cache_builder.prompts.sources import PromptSource
from secondcast.models.geometry import Geometry, geometry_of, vae_scale_factor
from secondcast.models.schedule import DTYPES, schedule_of
from secondcast.models.teacher.folder import TeacherFolder
from secondcast.storage_schemas.errors import BadSettings
from secondcast.storage_schemas.schema.generations import added_generations
from secondcast.storage_schemas.schema.manifest import (
    CodecName,
    Embeddings,
    Flags,
    Generation,
    Manifest,
    Pooled,
    PromptSet,
    Quantization,
    Sampling,
    ScheduleName,
    Storage,
    int8_problem,
    pooled_problem,
)
from secondcast.storage_schemas.schema.prompts import Prompt
from secondcast.storage_schemas.writer import prompt_set_fields

CREATED_BY = f"secondcast {secondcast.__version__}"
# A transformer reads it times 1000, in bfloat16: above this it soon is not finite.
LARGEST_GUIDANCE = 1e6
# FluxPipeline.check_inputs of diffusers.
LARGEST_TEXT_LENGTH = 512


class BuildSettings(Flags):
    """The flags of `secondcast build`; None means: as the teacher's folder states."""

    prompts: tuple[PromptSource, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    resolution: int | None = Field(default=None, ge=1)
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    text_length: int | None = Field(default=None, ge=1)
    pooled: Pooled = "zero"
    schedule: ScheduleName = "pipeline"
    attention_backend: str | None = None
    steps: int = Field(default=20, ge=1, le=1000)
    replicas: int = Field(default=1, ge=1)
    guidance: tuple[Annotated[float, Field(ge=0, le=LARGEST_GUIDANCE)], ...] = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantize: Quantization = "none"
    batch_size: int = Field(default=16, ge=1)
    shard_size: int = Field(default=64, ge=1)
    format: Literal["zarr", "webdataset"] = "zarr"
    codec: CodecName = "compact"
    latents: Literal["derived", "stored"] = "derived"
    embeddings: Embeddings = "stored"
    force: bool = False
    extend: bool = False

    @model_validator(mode="after")
    def _guidance_is_given(self) -> Self:
        if not self.guidance:
            raise ValueError("guidance has no value, expected at least one, such as 3.5 or 2.0:5.0:0.5")
        return self

    @field_validator("text_length")
    @classmethod
    def _text_length_is_the_pipelines(cls, value: int | None) -> int | None:
        if value is not None and value > LARGEST_TEXT_LENGTH:
            raise ValueError(
                f"FluxPipeline refuses a max_sequence_length above {LARGEST_TEXT_LENGTH}, and a student is used in it"
            )
        return value

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.height is None) != (self.width is None):
            given, other = ("height", "width") if self.width is None else ("width", "height")
            raise ValueError(f"--{given} is given without --{other}: give both, or --resolution for a square")
        if self.height is not None and self.resolution is not None:
            raise ValueError("--resolution is given beside --height and --width: give one or the other")
        return self

    @model_validator(mode="after")
    def _storage_holds_what_replay_needs(self) -> Self:
        if problem := int8_problem(self.codec, self.latents):
            raise ValueError(problem)
        if problem := pooled_problem(self.pooled, self.embeddings):
            raise ValueError(f"--pooled clip does not go with --embeddings none: {problem}")
        return self


class PlannedBuild(BuildSettings):
    """The flags of `secondcast plan build`: those of a build, but the prompts may be a number alone."""

    prompts: tuple[PromptSource, ...] = ()


def build_geometry(settings: BuildSettings, teacher: TeacherFolder) -> Geometry:
    """The geometry of the images: of the asked height and width, else square, of the asked or teacher's resolution."""
    side = settings.resolution or teacher.resolution
    return geometry_of(
        height=settings.height or side,
        width=settings.width or side,
        scale_factor=vae_scale_factor(teacher.config("vae")),
        channels=int(teacher.config("transformer")["in_channels"]),
    )


def plan_manifest(
    settings: BuildSettings, teacher: TeacherFolder, prompts: list[Prompt], replicas: Sequence[int] | None = None
) -> Manifest:
    """The manifest of the cache that was asked for. Hashes the teacher's weights.

    replicas: of each prompt, where they are not those of the settings.
    """
    return _manifest(settings, teacher, prompt_set_fields(prompts), replicas, hashed=True)


def outline_manifest(
    settings: BuildSettings, teacher: TeacherFolder, *, prompt_count: int, replicas: Sequence[int] | None = None
) -> Manifest:
    """The shapes and counts of that manifest, for planning: no prompt is read, no weights are there or hashed."""
    unknown = {"held_out": 0, "sources": {}, "ids": "", "bytes": 0, "xxh3_128": ""}
    return _manifest(settings, teacher, {"count": prompt_count, **unknown}, replicas, hashed=False)


def _generations(settings: BuildSettings, prompt_count: int, replicas: Sequence[int] | None) -> tuple[Generation, ...]:
    if replicas is not None and len(set(replicas)) > 1:
        bits = {count: (1 << count) - 1 for count in set(replicas)}
        wanted = {number: bits[count] for number, count in enumerate(replicas)}
        return added_generations({}, wanted, shard_size=settings.shard_size)
    return (
        Generation(
            first_prompt=0,
            prompts=prompt_count,
            first_replica=0,
            replicas=replicas[0] if replicas else settings.replicas,
            shard_size=settings.shard_size,
        ),
    )


def _manifest(
    settings: BuildSettings,
    teacher: TeacherFolder,
    prompt_set: dict[str, Any],
    replicas: Sequence[int] | None,
    *,
    hashed: bool,
) -> Manifest:
    text_length = settings.text_length or teacher.text_length
    return Manifest(
        source=teacher.pinned_source,
        created_by=CREATED_BY,
        teacher=teacher.identity(text_length=text_length, pooled=settings.pooled, hashed=hashed),
        sampling=_sampling(settings, teacher),
        prompts=PromptSet(generations=_generations(settings, prompt_set["count"], replicas), **prompt_set),
        metadata={},
    )


def _sampling(settings: BuildSettings, teacher: TeacherFolder) -> Sampling:
    geometry = build_geometry(settings, teacher)
    schedule = schedule_of(
        settings.schedule,
        teacher.config("scheduler"),
        steps=settings.steps,
        image_tokens=geometry.image_tokens,
        dtype=DTYPES[settings.dtype],
    )
    takes_guidance = bool(teacher.config("transformer")["guidance_embeds"])
    return Sampling(
        height=geometry.height,
        width=geometry.width,
        image_tokens=geometry.image_tokens,
        channels=geometry.channels,
        steps=schedule.steps,
        schedule=settings.schedule,
        sigmas=schedule.sigmas,
        timesteps=schedule.timesteps,
        guidance=settings.guidance if takes_guidance else None,
        seed=settings.seed,
        noise="philox-float32",
        dtype=settings.dtype,
        latent_rule="flow-match-euler",
        quantize=settings.quantize,
        storage=Storage(
            format=settings.format,
            codec=settings.codec,
            latents=settings.latents,
            embeddings=settings.embeddings,
        ),
    )


def guidance_values(text: str) -> tuple[float, ...]:
    """Guidance from a flag: "3.5", "2.0,3.5", or "2.0:5.0:0.5" (first, last, step); BadSettings otherwise."""
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(","))
        first, last, step = (float(part) for part in text.split(":"))
        count = round((last - first) / step) + 1
        if step <= 0 or count < 1:
            raise ValueError
        return tuple(round(first + i * step, 6) for i in range(count))
    except (ValueError, ZeroDivisionError) as error:
        raise BadSettings(
            f"--guidance is {text!r}, expected a value (3.5), several (2.0,3.5) or first:last:step (2.0:5.0:0.5)"
        ) from error
