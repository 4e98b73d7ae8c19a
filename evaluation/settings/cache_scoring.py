"""What an evaluation on a cache is asked for, and whether a cache has it: read from its manifest, without torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from secondcast.evaluation.pictures.distances import check_measurable
from secondcast.models.memory.options import MEMORY, BackboneCall, HeldWeights, MemoryOptions
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.flags import Flags, Shown
from secondcast.storage_schemas.schema.manifest import Dtype, Manifest, Quantization

TRAJECTORIES = 64
"""Held-out trajectories that an open loop is of, where no other number is asked for."""
_STEPS = "0,5,10"


def steps_of_text(text: str) -> tuple[int, ...]:
    """Numbers of steps from "0,5,10"; SettingsError if it is something else, or names one twice."""
    try:
        steps = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"--timesteps is {text!r}, expected numbers of steps such as {_STEPS}") from error
    if twice := [step for step in steps if steps.count(step) > 1]:
        raise SettingsError(
            f"--timesteps is {text!r}, which names step {twice[0]} twice: each counts once; name it once"
        )
    return steps


class BackboneCalls(BackboneCall):
    """How the transformer is called on recorded latents."""

    batch_size: Annotated[int, Shown(group=MEMORY)] = Field(
        default=8, ge=1, description="Rows of each call of the transformer."
    )


class VaeFolder(Flags):
    """Where the VAE is that decodes latents."""

    teacher: str | None = Field(default=None, description="Where vae/ lies here; default: as recorded.")


class ClosedLoop(Flags):
    """How many of the trajectories are sampled again with the student's embedding."""

    closed_loop: Annotated[int, Shown(metavar="N")] = Field(
        default=16, ge=0, description="Of these, sample N with the student leading, and decode; 0: none."
    )


class ShownSteps(Flags):
    """Steps of the trajectories."""

    timesteps: Annotated[tuple[int, ...] | None, Shown(metavar=_STEPS, text="")] = Field(
        default=None, min_length=1, description="These steps of the trajectories alone."
    )

    @field_validator("timesteps", mode="before")
    @classmethod
    def _steps_of_text(cls, value: Any) -> Any:
        return steps_of_text(value) if isinstance(value, str) else value


class CacheScoringOptions(BackboneCalls, HeldWeights, ClosedLoop, ShownSteps):
    """The options of an evaluation on a cache. The other options of memory: see MemoryOptions."""

    random_baseline: bool = Field(default=False, description="Have an untrained student lead as well.")
    quantize: Annotated[Literal["cache"] | Quantization, Shown(group=MEMORY)] = Field(
        default="cache", description="Its weights; cache: as recorded."
    )
    seed: int = Field(default=0, ge=0, description="Of --pocket's captions and noise, and of untrained weights.")


class CacheScoring(CacheScoringOptions):
    """An evaluation on a cache: these options, and of how many trajectories the open loop is."""

    num_trajectories: int = Field(default=TRAJECTORIES, ge=1)

    def dtype_of(self, manifest: Manifest) -> Dtype:
        """Of the backbone, on a cache."""
        return manifest.sampling.dtype if self.backbone_dtype == "cache" else self.backbone_dtype

    def memory_of(self, manifest: Manifest) -> MemoryOptions:
        """How the backbone is held, on a cache."""
        quantize = manifest.sampling.quantize if self.quantize == "cache" else self.quantize
        return MemoryOptions.from_flags(
            modulation=self.modulation,
            gpu_blocks=self.gpu_blocks,
            quantize=quantize,
            # Without a gradient nothing is checkpointed: it is what 8 bits are refused without.
            activation_checkpointing=1 if quantize in ("int8", "fp8") else 0,
        )

    def steps_on(self, cache: Cache) -> tuple[int, ...]:
        """Ascending numbers of steps; SettingsError for one that the cache has not."""
        steps = cache.manifest.sampling.steps
        chosen = tuple(range(steps)) if self.timesteps is None else tuple(sorted(set(self.timesteps)))
        if beyond := [step for step in chosen if not 0 <= step < steps]:
            raise SettingsError(
                f"--timesteps names step {beyond[0]}, the trajectories of {cache.folder} have the steps 0 to {steps - 1}"
            )
        return chosen

    def check_on(self, cache: Cache) -> None:
        """Raise SettingsError or MissingExtraError for what a cache cannot be evaluated with."""
        if self.closed_loop:
            check_measurable(cache.manifest.sampling.height, cache.manifest.sampling.width)
        self.steps_on(cache)
        self.memory_of(cache.manifest)
