"""What an evaluation on a cache is asked for, and whether a cache has it: read from its manifest, without torch."""

from typing import Literal

from pydantic import Field

from secondcast.evaluation.pictures.distances import check_measurable
from secondcast.models.memory.options import MemoryOptions
from secondcast.storage_schemas.errors import BadSettings
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.manifest import Flags, Manifest, Quantization


class CacheScoring(Flags):
    """The flags of an evaluation on a cache.

    count: trajectories of the open loop; closed_loop: how many of these are sampled anew. steps_of: None: all.
    "cache": as the cache was recorded. seed: of the untrained student's weights. The rest: see MemoryOptions.
    """

    count: int = Field(default=64, ge=1)
    steps_of: tuple[int, ...] | None = Field(default=None, min_length=1)
    closed_loop: int = Field(default=16, ge=0)
    untrained: bool = False
    batch_size: int = Field(default=8, ge=1)
    backbone_dtype: Literal["cache", "bfloat16", "float32"] = "cache"
    quantize: Literal["cache"] | Quantization = "cache"
    modulation: Literal["auto", "table", "host", "live"] = "auto"
    resident_blocks: int | None = Field(default=None, ge=0)
    attention_backend: str | None = None
    seed: int = Field(default=0, ge=0)

    def dtype_of(self, manifest: Manifest) -> Literal["bfloat16", "float32"]:
        """Of the backbone, on a cache."""
        return manifest.sampling.dtype if self.backbone_dtype == "cache" else self.backbone_dtype

    def memory_of(self, manifest: Manifest) -> MemoryOptions:
        """How the backbone is held, on a cache."""
        quantize = manifest.sampling.quantize if self.quantize == "cache" else self.quantize
        return MemoryOptions.from_flags(
            modulation=self.modulation,
            resident_blocks=self.resident_blocks,
            quantize=quantize,
            # Without a gradient nothing is checkpointed: it is what 8 bits are refused without.
            checkpoint_blocks=1 if quantize in ("int8", "fp8") else 0,
        )

    def steps_on(self, cache: Cache) -> tuple[int, ...]:
        """Ascending numbers of steps; BadSettings for one that the cache has not."""
        steps = cache.manifest.sampling.steps
        chosen = tuple(range(steps)) if self.steps_of is None else tuple(sorted(set(self.steps_of)))
        if beyond := [step for step in chosen if not 0 <= step < steps]:
            raise BadSettings(
                f"--steps-of names step {beyond[0]}, the trajectories of {cache.folder} have the steps 0 to {steps - 1}"
            )
        return chosen

    def check_on(self, cache: Cache) -> None:
        """Raise BadSettings or MissingExtra for what a cache cannot be evaluated with."""
        if self.closed_loop:
            check_measurable(cache.manifest.sampling.height, cache.manifest.sampling.width)
        self.steps_on(cache)
        self.memory_of(cache.manifest)
