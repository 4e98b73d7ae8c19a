"""The options of `secondcast build` and `secondcast plan build`."""

from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from secondcast.cache_builder.prompts.sources import PromptSource
from secondcast.models.families.family import Family
from secondcast.models.families.registry import FAMILIES
from secondcast.models.memory.options import AttentionBackend, MemoryOptions, SamplingMemory
from secondcast.models.teacher.pipeline_inputs import (
    LARGEST_GUIDANCE,
    STEPS,
    ImageSize,
)
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flag, Flags
from secondcast.storage_schemas.schema.recording import (
    CodecName,
    Dtype,
    Format,
    Latents,
    Pooled,
    Quantization,
    ScheduleName,
    int8_problem,
    pooled_problem,
    text_compression_problem,
)

_IMAGE, _TEACHER, _STORAGE = "Images", "Teacher", "Cache"
Prompts = Annotated[
    tuple[PromptSource, ...],
    Flag(metavar="SOURCE"),
    Field(
        description="Prompt source: a file (a prompt per line; .json, .jsonl, .csv, .tsv, .parquet), - for stdin, or "
        "hf:NAME, followed by any of :name= :limit= :repeat= (multiplies --samples-per-prompt) :column= :split= "
        ":config= :revision=; may be repeated."
    ),
]


def guidance_values(text: str) -> tuple[float, ...]:
    """Parse guidance scales: "3.5", "2.0,3.5", or "2.0:5.0:0.5" (first, last, step); SettingsError otherwise."""
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


_GUIDANCE = ", ".join(
    f"{scales} for {family.title}" for scales, family in {family.guidance: family for family in FAMILIES[::-1]}.items()
)


class StoredAs(Flags):
    """The options that determine the size of the rows of a cache, besides their shapes."""

    dtype: Annotated[Dtype, Flag(group=_TEACHER)] = Field(
        default="bfloat16", description="Compute dtype of the teacher, and dtype of the stored arrays."
    )
    compression: Annotated[CodecName, Flag(group=_STORAGE)] = Field(
        default="lossless",
        description="Compression of the arrays; int8: predictions in 8 bits, requires --latents stored.",
    )
    latents: Annotated[Latents | None, Flag(group=_STORAGE)] = Field(
        default=None,
        description="Store the latents, or derive them exactly from noise and predictions. Default: derived; stored "
        "for families with classifier-free guidance.",
    )


class PromptLimit(Flags):
    """The number of prompts used."""

    limit: int | None = Field(default=None, ge=1, description="Number of distinct prompts to use; default: all.")


class OutlineSettings(StoredAs, ImageSize, PromptLimit):
    """Every option that affects a cache and its bytes, except the prompts; None: as the teacher's folder states."""

    steps: Annotated[int, Flag(group=_IMAGE)] = Field(
        default=STEPS, ge=1, le=1000, description="Sampling steps per trajectory."
    )
    samples_per_prompt: Annotated[int, Flag(group=_IMAGE)] = Field(
        default=1, ge=1, description="Trajectories per prompt, each from its own noise."
    )
    guidance: Annotated[
        tuple[Annotated[float, Field(ge=0, le=LARGEST_GUIDANCE)], ...] | None,
        Flag(group=_IMAGE, text=FAMILIES[0].guidance),
    ] = Field(
        default=None,
        description=f"Guidance scales: one value, a list, or first:last:step. Default: {_GUIDANCE}.",
    )
    seed: Annotated[int, Flag(group=_IMAGE)] = Field(
        default=0, ge=0, lt=2**63, description="Seed of the noise, which is a function of seed, prompt and sample."
    )
    text_length: Annotated[int | None, Flag(group=_TEACHER)] = Field(
        default=None,
        ge=1,
        description="Text tokens; default: the family's (77 for FLUX.1), or the tokenizer's if fewer.",
    )
    pooled: Annotated[Pooled | None, Flag(group=_TEACHER)] = Field(
        default=None,
        description="The pooled text input: zero as in the paper, or CLIP's. Default: zero; CLIP's where the family "
        "needs it.",
    )
    schedule: Annotated[ScheduleName, Flag(group=_TEACHER)] = Field(
        default="diffusers",
        description="Sigma schedule of the pipeline (diffusers) or of the paper's script (distillt5, FLUX.1 only).",
    )
    quantize: Annotated[Quantization, Flag(group=_TEACHER)] = Field(
        default="none", description="Quantize the transformer to 8 or 4 bits for sampling; train with the same value."
    )
    batch_size: Annotated[int, Flag(group=_TEACHER)] = Field(
        default=16, ge=1, description="Batch size of the teacher's networks; may change on resume."
    )
    shard_size: Annotated[int, Flag(group=_STORAGE)] = Field(default=64, ge=1, description="Trajectories per shard.")
    format: Annotated[Format, Flag(group=_STORAGE)] = Field(
        default="zarr", description="Storage format: sharded Zarr arrays, or WebDataset tar files."
    )
    text_only: Annotated[bool, Flag(group=_STORAGE)] = Field(
        default=False,
        description="Build a text cache: prompts and embeddings without trajectories, for the embedding and context "
        "losses.",
    )
    store_embeddings: Annotated[bool, Flag(group=_STORAGE)] = Field(
        default=True,
        description="Store the teacher's embeddings; without them the cache is smaller, but supports neither the "
        "replay check nor the embedding loss.",
    )

    @field_validator("guidance", mode="before")
    @classmethod
    def _guidance_of_text_or_number(cls, value: Any) -> Any:
        if isinstance(value, str):
            return guidance_values(value)
        return (value,) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _guidance_is_given(self) -> Self:
        if self.guidance == ():
            raise ValueError("guidance is empty, expected at least one value, such as 3.5 or 2.0:5.0:0.5")
        return self

    @model_validator(mode="after")
    def _text_has_no_options_of_trajectories(self) -> Self:
        fields = OutlineSettings.model_fields
        for name in _OF_TRAJECTORIES if self.text_only else ():
            if (value := getattr(self, name)) != fields[name].default:
                flag = "--no-store-embeddings" if name == "store_embeddings" else f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag} is given ({value}) with --text-only, which records no trajectories: remove one of them"
                )
        if self.text_only and (problem := text_compression_problem(self.compression)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _storage_holds_what_replay_needs(self) -> Self:
        if self.latents is not None and (problem := int8_problem(self.compression, self.latents)):
            raise ValueError(problem)
        if problem := pooled_problem(self.pooled or "zero", "stored" if self.store_embeddings else "none"):
            raise ValueError(f"--pooled clip is incompatible with --no-store-embeddings: {problem}")
        return self

    def resolved(self, family: Family) -> "ResolvedSettings":
        """What is not given, as a family has it; SettingsError for what it does not have."""
        pooled, latents = family.pooled_choice(self.pooled), self.latents or family.latents
        guidance = self.guidance or guidance_values(family.guidance)
        if family.guidance_rule == "cfg" and latents == "derived":
            raise SettingsError(
                f"--latents is derived, expected stored: the latents of {family.title} follow from guided predictions, "
                f"and a cache has the conditional ones; remove it"
            )
        if problem := int8_problem(self.compression, latents):
            raise SettingsError(problem)
        family.check_guidance(guidance)
        if problem := pooled_problem(pooled, "stored" if self.store_embeddings else "none"):
            raise SettingsError(f"--no-store-embeddings cannot be used with {family.title}: {problem}")
        return ResolvedSettings(pooled=pooled, latents=latents, guidance=guidance)


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings:
    """Options whose defaults depend on the family."""

    pooled: Pooled
    latents: Latents
    guidance: tuple[float, ...]


_OF_TRAJECTORIES = (
    *ImageSize.model_fields,
    "steps",
    "samples_per_prompt",
    "guidance",
    "seed",
    "schedule",
    "quantize",
    "latents",
    "store_embeddings",
)


class PlannedBuild(OutlineSettings):
    """The options of `secondcast plan build` that define the cache; prompts may be replaced by their number."""

    prompts: Prompts = ()


class BuildSettings(PlannedBuild, AttentionBackend, SamplingMemory):
    """The options of `secondcast build` that define the cache, and how the transformer computes."""

    prompts: Prompts = Field(min_length=1)
    extend: Annotated[bool, Flag(group=_STORAGE)] = Field(
        default=False, description="Add prompts or samples to an existing cache; existing data is kept."
    )
    skip_disk_check: Annotated[bool, Flag(group=_STORAGE)] = Field(
        default=False, description="Build even if the disk seems too small."
    )

    @property
    def memory(self) -> SamplingMemory:
        """Where the weights of the transformer go."""
        return SamplingMemory(**{name: getattr(self, name) for name in SamplingMemory.model_fields})


def placed(memory: SamplingMemory, quantize: Quantization, pooled: Pooled) -> MemoryOptions:
    """The memory options of a build as far as they are given: "auto" keeps the modulation weights.

    A modulation table has the bits of calls with the batch size of the build; the last batch of a shard may be smaller.
    """
    return memory.placed(quantize, pooled_varies=pooled == "clip", auto="gpu")
