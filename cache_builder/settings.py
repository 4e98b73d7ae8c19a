"""What a build is asked to do: the options of `secondcast build` and `secondcast plan build`."""

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from secondcast.cache_builder.prompts.sources import PromptSource
from secondcast.models.memory.options import AttentionBackend
from secondcast.models.teacher.pipeline_inputs import (
    LARGEST_GUIDANCE,
    LARGEST_TEXT_LENGTH,
    STEPS,
    ImageSize,
)
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flags, Shown
from secondcast.storage_schemas.schema.manifest import (
    CodecName,
    Dtype,
    Format,
    Latents,
    Pooled,
    Quantization,
    ScheduleName,
    int8_problem,
    pooled_problem,
)

_IMAGE, _TEACHER, _STORAGE = "Images", "Teacher", "Cache"
Prompts = Annotated[
    tuple[PromptSource, ...],
    Shown(metavar="SOURCE"),
    Field(
        description="File (a prompt per line; .json, .jsonl, .csv, .tsv, .parquet), - or hf:NAME, with any of :name= "
        ":limit= :repeat= (times the replicas) :column= :split= :config= :revision= behind it; may be repeated."
    ),
]


def guidance_values(text: str) -> tuple[float, ...]:
    """Guidance from text: "3.5", "2.0,3.5", or "2.0:5.0:0.5" (first, last, step); SettingsError otherwise."""
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(","))
        first, last, step = (float(part) for part in text.split(":"))
        count = round((last - first) / step) + 1
        if step <= 0 or count < 1:
            raise ValueError
        return tuple(round(first + i * step, 6) for i in range(count))
    except (ValueError, ZeroDivisionError) as error:
        raise SettingsError(
            f"--guidance is {text!r}, expected a value (3.5), several (2.0,3.5) or first:last:step (2.0:5.0:0.5)"
        ) from error


_GUIDANCE = "2.0:5.0:0.5"


class StoredAs(Flags):
    """What decides the size of the rows of a cache, beside their shapes."""

    dtype: Annotated[Dtype, Shown(group=_TEACHER)] = Field(
        default="bfloat16", description="Of the teacher's arithmetic and of what is stored."
    )
    compression: Annotated[CodecName, Shown(group=_STORAGE)] = Field(
        default="lossless", description="compact: lossless; int8: predictions in 8 bits, with --latents stored."
    )
    latents: Annotated[Latents, Shown(group=_STORAGE)] = Field(
        default="derived", description="Store latents, or derive them exactly."
    )


class PromptLimit(Flags):
    """How many of the prompts are taken."""

    limit: int | None = Field(default=None, ge=1, description="Only the first that many distinct prompts.")


class OutlineSettings(StoredAs, ImageSize, PromptLimit):
    """What shapes a cache and its bytes, but the prompts; None means: as the teacher's folder states."""

    steps: Annotated[int, Shown(group=_IMAGE)] = Field(
        default=STEPS, ge=1, le=1000, description="Sampler steps per trajectory."
    )
    samples_per_prompt: Annotated[int, Shown(group=_IMAGE)] = Field(
        default=1, ge=1, description="Trajectories per prompt."
    )
    guidance: Annotated[
        tuple[Annotated[float, Field(ge=0, le=LARGEST_GUIDANCE)], ...], Shown(group=_IMAGE, text=_GUIDANCE)
    ] = Field(default=guidance_values(_GUIDANCE), description="One value, a list, or first:last:step.")
    seed: Annotated[int, Shown(group=_IMAGE)] = Field(
        default=0, ge=0, lt=2**63, description="The noise is a function of seed, prompt and replica."
    )
    text_length: Annotated[int | None, Shown(group=_TEACHER)] = Field(
        default=None, ge=1, description="T5 tokens, up to 512; default 77, or the teacher's own."
    )
    pooled: Annotated[Pooled, Shown(group=_TEACHER)] = Field(
        default="zero", description="FLUX's pooled input; zero: the paper's."
    )
    schedule: Annotated[ScheduleName, Shown(group=_TEACHER)] = Field(
        default="diffusers", description="FluxPipeline's sigmas, or those of the paper's script."
    )
    quantize: Annotated[Quantization, Shown(group=_TEACHER)] = Field(
        default="none", description="Sample with the transformer's weights in 8 or 4 bits, for training with the same."
    )
    batch_size: Annotated[int, Shown(group=_TEACHER)] = Field(
        default=16, ge=1, description="Rows of each call of a network; may change on resume."
    )
    shard_size: Annotated[int, Shown(group=_STORAGE)] = Field(default=64, ge=1, description="Trajectories per shard.")
    format: Annotated[Format, Shown(group=_STORAGE)] = Field(
        default="zarr", description="zarr: sharded arrays; webdataset: tar files."
    )
    store_embeddings: Annotated[bool, Shown(group=_STORAGE)] = Field(
        default=True,
        description="Keep the teacher's embeddings; without them the cache is smaller, but has no replay check and "
        "trains with the vision loss alone.",
    )

    @field_validator("guidance", mode="before")
    @classmethod
    def _guidance_of_text(cls, value: Any) -> Any:
        return guidance_values(value) if isinstance(value, str) else value

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
    def _storage_holds_what_replay_needs(self) -> Self:
        if problem := int8_problem(self.compression, self.latents):
            raise ValueError(problem)
        if problem := pooled_problem(self.pooled, "stored" if self.store_embeddings else "none"):
            raise ValueError(f"--pooled clip does not go with --no-store-embeddings: {problem}")
        return self


class PlannedBuild(OutlineSettings):
    """The options of `secondcast plan build` that say what would be built; the prompts may be a number alone."""

    prompts: Prompts = ()


class BuildSettings(PlannedBuild, AttentionBackend):
    """The options of `secondcast build` that say what is built."""

    prompts: Prompts = Field(min_length=1)
    extend: Annotated[bool, Shown(group=_STORAGE)] = Field(
        default=False, description="Add prompts or replicas to this cache; what it holds stays."
    )
    skip_disk_check: Annotated[bool, Shown(group=_STORAGE)] = Field(
        default=False, description="Begin even where the disk looks too small."
    )
