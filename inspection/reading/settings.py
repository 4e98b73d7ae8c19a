"""The options of `secondcast inspect reading`."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from secondcast.evaluation.settings.cache_scoring import BackboneCalls, CacheScoring
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flag

_RANKS = "16,64,256"
# What mattered on the pocket was decided between 16 and 64 (docs/experiments.md); above, a rank is twice the last one.
_SMALL_RANKS = (16, 32, 48, 64)


def ranks_of_text(text: str) -> tuple[int, ...]:
    """Parse ranks such as "16,64,256", in ascending order; SettingsError for other text, zero or duplicates."""
    try:
        ranks = tuple(sorted(int(part) for part in text.split(",")))
    except ValueError as error:
        raise SettingsError(f"--ranks is {text!r}, expected numbers such as {_RANKS}") from error
    if ranks[0] < 1:
        raise SettingsError(f"--ranks has {ranks[0]}, expected ranks from 1")
    if twice := [rank for rank in ranks if ranks.count(rank) > 1]:
        raise SettingsError(f"--ranks is {text!r}, which has rank {twice[0]} twice: give each rank once")
    return ranks


class ReadingOptions(BackboneCalls):
    """The options of a reading.

    On the pocket twice as many gradients change no loss by more than the choice of the seed does. With the defaults,
    FLUX takes about 100 PFLOP at 512 px, 5 minutes of an H100 (docs/inspecting.md).
    """

    num_records: Annotated[int, Flag(metavar="N")] = Field(
        default=128,
        ge=1,
        description="Held-out records (steps of trajectories) on which each changed embedding is replayed.",
    )
    num_gradients: Annotated[int, Flag(metavar="N")] = Field(
        default=256, ge=1, description="Records of training prompts whose gradients give the measured metric."
    )
    num_prompts: Annotated[int, Flag(metavar="N")] = Field(
        default=1024, ge=1, description="Training prompts whose embeddings give mean, covariance and padding."
    )
    num_latents: Annotated[int, Flag(metavar="N")] = Field(
        default=8, ge=1, description="Held-out records on whose latents the prompt lists of --teacher are compared."
    )
    ranks: Annotated[tuple[int, ...] | None, Flag(metavar=_RANKS, text="")] = Field(
        default=None,
        min_length=1,
        description="Ranks of the truncated embedding; default: 16, 32, 48, 64 and doublings up to the text width.",
    )
    seed: int = Field(
        default=0, ge=0, description="Seed of the choice of records and of the random projections of gradients."
    )

    @field_validator("ranks", mode="before")
    @classmethod
    def _ranks_of_text(cls, value: Any) -> Any:
        return ranks_of_text(value) if isinstance(value, str) else value

    def ranks_on(self, width: int) -> tuple[int, ...]:
        """Ranks in ascending order for a text width; SettingsError for one above it."""
        if self.ranks is not None:
            if self.ranks[-1] > width:
                raise SettingsError(
                    f"--ranks has {self.ranks[-1]}, expected ranks up to {width}, the width of the cache's embeddings"
                )
            return self.ranks
        ranks = list(_SMALL_RANKS)
        while ranks[-1] < width:
            ranks.append(2 * ranks[-1])
        return (*(rank for rank in ranks if rank < width), width)

    def scoring(self) -> CacheScoring:
        """The options of the transformer's calls."""
        calls = {name: getattr(self, name) for name in BackboneCalls.model_fields}
        return CacheScoring(closed_loop=0, **calls)
