"""A trajectory in memory: one teacher sampling run."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

from secondcast.storage_schemas.schema.derivation import derive_latents
from secondcast.storage_schemas.schema.fields import Array, Arrays


class Label(TypedDict, total=False):
    """The JSON label of a tar sample: key, prompt (its text), prompt_id, sample_index."""

    key: str
    prompt: str
    prompt_id: str
    sample_index: int


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Latents x_0 .. x_K, predictions v_0 .. v_{K-1}, guidance scale (None where the backbone takes none).

    index: position in the cache.
    prompt: number of its prompt.
    key: its name, unique within the cache.
    """

    index: int
    key: str
    prompt: int
    sample_index: int
    guidance: float | None
    sigmas: tuple[float, ...]
    noise_SC: Array
    velocity_KSC: Array
    final_latent_SC: Array
    stored_latents_KSC: Array | None = None

    @cached_property
    def hidden_states_KSC(self) -> Array:
        """x_0 .. x_{K-1}, the inputs of the backbone; derived from noise and velocity unless stored."""
        if self.stored_latents_KSC is not None:
            return self.stored_latents_KSC
        return derive_latents(self.noise_SC, self.velocity_KSC, self.sigmas)[:-1]


def trajectory_key(prompt_id: str, sample_index: int) -> str:
    """Name of a trajectory: the same in every cache, format and segment."""
    return f"{prompt_id}-{sample_index:04d}"


def trajectory_of(
    row: Arrays, *, index: int, key: str, prompt: int, sample_index: int, sigmas: Sequence[float]
) -> Trajectory:
    """Build a trajectory from one row of a shard."""
    stored = row.get("hidden_states")
    return Trajectory(
        index=index,
        key=key,
        prompt=prompt,
        sample_index=sample_index,
        guidance=float(row["guidance"]) if "guidance" in row else None,
        sigmas=tuple(sigmas),
        noise_SC=row["noise"] if stored is None else stored[0],
        velocity_KSC=row["velocity"],
        final_latent_SC=row["final_latent"],
        stored_latents_KSC=stored,
    )
