"""Options of an evaluation on a cache, validated against its manifest without torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from secondcast.evaluation.pictures.distances import check_measurable
from secondcast.models.memory.options import MEMORY, BackboneCall, MemoryOptions, SamplingMemory
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.flags import Flag, Flags
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.recording import Dtype, Quantization

TRAJECTORIES = 64
"""Default number of held-out trajectories of an open-loop evaluation."""
_STEPS = "0,5,10"


def steps_of_text(text: str) -> tuple[int, ...]:
    """Parse step numbers such as "0,5,10"; SettingsError for other text or duplicates."""
    try:
        steps = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"--timesteps is {text!r}, expected step numbers such as {_STEPS}") from error
    if twice := [step for step in steps if steps.count(step) > 1]:
        raise SettingsError(f"--timesteps is {text!r}, which has step {twice[0]} twice: give each step once")
    return steps


class BackboneCalls(BackboneCall, SamplingMemory):
    """Options of transformer calls on recorded latents."""

    batch_size: Annotated[int, Flag(group=MEMORY)] = Field(
        default=8, ge=1, description="Batch size of the transformer."
    )


class VaeFolder(Flags):
    """Location of the VAE that decodes latents."""

    teacher: str | None = Field(default=None, description="Teacher folder with vae/; default: as recorded.")


class ClosedLoop(Flags):
    """Sampling with the student's embedding from cached noise."""

    closed_loop: Annotated[int, Flag(metavar="N")] = Field(
        default=16, ge=0, description="Trajectories to resample with the student's embedding and decode; 0: none."
    )
    random_baseline: bool = Field(default=False, description="Also sample an untrained student in the closed loop.")


class ShownSteps(Flags):
    """Steps of the trajectories."""

    timesteps: Annotated[tuple[int, ...] | None, Flag(metavar=_STEPS, text="")] = Field(
        default=None, min_length=1, description="Steps of the trajectories to use; default: all."
    )

    @field_validator("timesteps", mode="before")
    @classmethod
    def _steps_of_text(cls, value: Any) -> Any:
        return steps_of_text(value) if isinstance(value, str) else value


class CacheScoringOptions(BackboneCalls, ClosedLoop, ShownSteps):
    """The options of an evaluation on a cache. For the other memory options see MemoryOptions."""

    quantize: Annotated[Literal["cache"] | Quantization, Flag(group=MEMORY)] = Field(
        default="cache", description="Weights of the transformer; cache: as recorded."
    )
    seed: int = Field(default=0, ge=0, description="Seed of --pocket's captions and noise, and of untrained weights.")


class CacheScoring(CacheScoringOptions):
    """An evaluation on a cache: these options, and the number of trajectories of the open loop."""

    num_trajectories: int = Field(default=TRAJECTORIES, ge=1)

    def dtype_of(self, manifest: Manifest) -> Dtype:
        """Dtype of the backbone on a cache."""
        return manifest.sampling.dtype if self.backbone_dtype == "cache" else self.backbone_dtype

    def memory_of(self, manifest: Manifest) -> MemoryOptions:
        """Memory options of the backbone on a cache."""
        quantize = manifest.sampling.quantize if self.quantize == "cache" else self.quantize
        return MemoryOptions.from_flags(
            modulation=self.modulation,
            gpu_blocks=self.gpu_blocks,
            quantize=quantize,
            # Checkpointing has no effect without gradients, but quantized weights are refused without it.
            activation_checkpointing=1 if quantize in ("int8", "fp8") else 0,
        )

    def steps_on(self, cache: Cache) -> tuple[int, ...]:
        """Step numbers in ascending order; SettingsError for one that the cache does not have."""
        steps = cache.manifest.sampling.steps
        chosen = tuple(range(steps)) if self.timesteps is None else tuple(sorted(set(self.timesteps)))
        if beyond := [step for step in chosen if not 0 <= step < steps]:
            raise SettingsError(
                f"--timesteps has step {beyond[0]}, but the trajectories of {cache.folder} have steps 0 to {steps - 1}"
            )
        return chosen

    def check_on(self, cache: Cache) -> None:
        """Raise SettingsError or MissingExtraError if a cache cannot be evaluated with these options."""
        if self.closed_loop:
            check_measurable(cache.manifest.sampling.height, cache.manifest.sampling.width)
        self.steps_on(cache)
        self.memory_of(cache.manifest)
