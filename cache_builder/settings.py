"""What a build is asked to do, validated, and the manifest that follows from it and the teacher."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from models.geometry import Geometry, geometry_of, vae_scale_factor
from models.schedule import DTYPES, pipeline_schedule
from models.teacher_folder import TeacherFolder
from storage_schemas.errors import BadSettings
from storage_schemas.manifest import (
    CodecName,
    Embeddings,
    Generation,
    Manifest,
    PromptSet,
    Record,
    Sampling,
    Storage,
    first_wrong_flag,
    int8_problem,
)
from storage_schemas.prompts import Prompt
from storage_schemas.writer import prompt_set_fields

CREATED_BY = "understudy 0.1.0"


class BuildSettings(Record):
    """The flags of `understudy build`; None means: as the teacher's folder states."""

    prompts: tuple[Path, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    resolution: int | None = Field(default=None, ge=1)
    steps: int = Field(default=20, ge=1, le=1000)
    replicas: int = Field(default=1, ge=1)
    guidance: tuple[float, ...] = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch_size: int = Field(default=16, ge=1)
    shard_size: int = Field(default=64, ge=1)
    format: Literal["zarr", "webdataset"] = "zarr"
    codec: CodecName = "compact"
    latents: Literal["derived", "stored"] = "derived"
    embeddings: Embeddings = "stored"
    extend: bool = False

    @model_validator(mode="after")
    def _guidance_is_given(self) -> Self:
        if not self.guidance:
            raise ValueError("guidance has no value, expected at least one, such as 3.5 or 2.0:5.0:0.5")
        return self

    @model_validator(mode="after")
    def _int8_stores_latents(self) -> Self:
        if problem := int8_problem(self.codec, self.latents):
            raise ValueError(problem)
        return self

    @classmethod
    def from_flags(cls, **flags: Any) -> Self:
        """Validate flags; BadSettings names the first one that is wrong."""
        try:
            return cls(**flags)
        except ValidationError as error:
            raise BadSettings(first_wrong_flag(error)) from error


def build_geometry(settings: BuildSettings, teacher: TeacherFolder) -> Geometry:
    """The geometry of the images: square, of the asked or the teacher's resolution."""
    side = settings.resolution or teacher.resolution
    return geometry_of(
        height=side,
        width=side,
        scale_factor=vae_scale_factor(teacher.config("vae")),
        channels=int(teacher.config("transformer")["in_channels"]),
    )


def plan_manifest(settings: BuildSettings, teacher: TeacherFolder, prompts: list[Prompt]) -> Manifest:
    """The manifest of the cache that was asked for. Hashes the teacher's weights."""
    geometry = build_geometry(settings, teacher)
    schedule = pipeline_schedule(
        teacher.config("scheduler"),
        steps=settings.steps,
        image_tokens=geometry.image_tokens,
        dtype=DTYPES[settings.dtype],
    )
    takes_guidance = bool(teacher.config("transformer")["guidance_embeds"])
    sampling = Sampling(
        height=geometry.height,
        width=geometry.width,
        image_tokens=geometry.image_tokens,
        channels=geometry.channels,
        steps=schedule.steps,
        schedule="pipeline",
        sigmas=schedule.sigmas,
        timesteps=schedule.timesteps,
        guidance=settings.guidance if takes_guidance else None,
        seed=settings.seed,
        noise="philox-float32",
        dtype=settings.dtype,
        latent_rule="flow-match-euler",
        storage=Storage(
            format=settings.format,
            codec=settings.codec,
            latents=settings.latents,
            embeddings=settings.embeddings,
        ),
    )
    generation = Generation(
        first_prompt=0,
        prompts=len(prompts),
        first_replica=0,
        replicas=settings.replicas,
        shard_size=settings.shard_size,
    )
    return Manifest(
        source=teacher.source,
        created_by=CREATED_BY,
        teacher=teacher.identity(text_length=teacher.text_length),
        sampling=sampling,
        prompts=PromptSet(generations=(generation,), **prompt_set_fields(prompts)),
        metadata={},
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
