"""The committed trajectories of a cache as a sequence; the arrays of each are read when one of them is first used."""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol, overload

from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.record import Trajectory, trajectory_key
from secondcast.storage_schemas.schema.fields import Array, Arrays
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.prompts import Prompt, PromptTable


class TrajectoryReader(Protocol):
    """What a trajectory is read from: a Cache."""

    manifest: Manifest
    layout: Layout
    prompts: PromptTable

    def guidance(self, index: int) -> float | None:
        """Guidance scale of trajectory `index`."""

    def trajectory(self, index: int) -> Trajectory:
        """Read trajectory `index` with all its fields."""

    def embedding(self, prompt: int) -> Array:
        """The teacher's embedding of prompt number `prompt`, [T, D]."""

    def conditioning(self, prompt: int) -> Arrays:
        """What the transformer received with prompt number `prompt` besides its embedding, by name."""


class RecordedTrajectory:
    """One sampling run of the teacher: its prompt, and K steps from noise to the final latent.

    Arrays have the dtype of the cache; `secondcast.to_torch` makes a tensor of one. Reading raises DamagedCacheError
    for a file that differs from its commit record.

    index: its position in the finished cache, as `inspect show` numbers it.
    """

    def __init__(self, cache: TrajectoryReader, index: int) -> None:
        self._cache, self.index = cache, index
        place = cache.layout.place(index)
        self._prompt, self.sample_index = place.prompt, place.sample_index

    def __repr__(self) -> str:
        return f"RecordedTrajectory(index={self.index}, key={self.key!r}, prompt={self.prompt!r})"

    @cached_property
    def _recorded_prompt(self) -> Prompt:
        return self._cache.prompts[self._prompt]

    @cached_property
    def _read(self) -> Trajectory:
        return self._cache.trajectory(self.index)

    @property
    def key(self) -> str:
        """Its name, unique within the cache."""
        return trajectory_key(self._recorded_prompt.id, self.sample_index)

    @property
    def prompt(self) -> str:
        """The text of the prompt."""
        return self._recorded_prompt.text

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the prompt sources that have this prompt."""
        return self._recorded_prompt.sources

    @property
    def held_out(self) -> bool:
        """Whether this prompt is never used in training."""
        return self._recorded_prompt.held_out

    @property
    def guidance(self) -> float | None:
        """Guidance scale; None where the transformer takes none."""
        return self._cache.guidance(self.index)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The K + 1 noise levels of the schedule, from 1 to 0."""
        return self._cache.manifest.sampling.sigmas

    @property
    def noise_SC(self) -> Array:
        """The latent at the start."""
        return self._read.noise_SC

    @property
    def hidden_states_KSC(self) -> Array:
        """The latents that the transformer received, one per step."""
        return self._read.hidden_states_KSC

    @property
    def velocity_KSC(self) -> Array:
        """The predictions of the transformer, one per step."""
        return self._read.velocity_KSC

    @property
    def final_latent_SC(self) -> Array:
        """The latent after the last step, which the VAE decodes."""
        return self._read.final_latent_SC

    @property
    def embedding_TD(self) -> Array:
        """The teacher's embedding of the prompt; NotInCacheError in a cache that was built without embeddings."""
        return self._cache.embedding(self._prompt)

    @property
    def conditioning(self) -> Arrays:
        """What the transformer received of the prompt besides its embedding, by name."""
        return self._cache.conditioning(self._prompt)


class Trajectories(Sequence[RecordedTrajectory]):
    """Trajectories of a cache by position; a slice is a sequence of the same kind."""

    def __init__(self, cache: TrajectoryReader, indices: Array) -> None:
        """indices: of the trajectories in the cache, int64."""
        self._cache, self._indices = cache, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, position: int) -> RecordedTrajectory: ...
    @overload
    def __getitem__(self, position: slice) -> "Trajectories": ...
    def __getitem__(self, position: int | slice) -> "RecordedTrajectory | Trajectories":
        if isinstance(position, slice):
            return Trajectories(self._cache, self._indices[position])
        return RecordedTrajectory(self._cache, int(self._indices[position]))

    def __repr__(self) -> str:
        return f"<{counted(len(self), 'trajectory')} of {self._cache}>"
