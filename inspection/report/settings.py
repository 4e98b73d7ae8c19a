"""What a report is asked to show: the options of `secondcast inspect report`."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from secondcast.evaluation.settings.cache_scoring import (
    TRAJECTORIES,
    BackboneCalls,
    CacheScoring,
    ClosedLoop,
    VaeFolder,
)
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Shown

_STRIPS = 64


def count_of_strips(text: str) -> int | None:
    """A number from 0 on; None for "all". SettingsError for something else."""
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit()):
        raise SettingsError(
            f"--num-strips is {text!r}, expected a number of trajectories such as 64, 0 for none, or all"
        )
    return int(text)


class ReportSettings(BackboneCalls, ClosedLoop, VaeFolder):
    """The options of a report. strips: None stands for all."""

    students: Annotated[tuple[Path, ...], Shown(flag="--student", metavar="RUN_OR_EXPORT")] = Field(
        default=(), description="Evaluate it on held-out trajectories; repeatable."
    )
    evaluations: Annotated[tuple[Path, ...], Shown(flag="--evaluation", metavar="FILE.json")] = Field(
        default=(), description="A student as `evaluate score --out` recorded it; repeatable."
    )
    num_strips: Annotated[int | None, Shown(metavar="N", text=str(_STRIPS))] = Field(
        default=_STRIPS, ge=0, description="Film strips, half of the hardest, half at random; 0: none; all."
    )
    num_frames: Annotated[int | None, Shown(metavar="N")] = Field(
        default=None, ge=1, description="Steps of a strip; default: all."
    )
    frame_size: Annotated[int, Shown(metavar="PX")] = Field(
        default=96, ge=16, le=1024, description="Largest side of a frame."
    )
    num_trajectories: Annotated[int, Shown(metavar="N")] = Field(
        default=TRAJECTORIES, ge=0, description="Held-out trajectories that students are evaluated on; 0: none."
    )
    max_norms: Annotated[int, Shown(metavar="N")] = Field(
        default=5000, ge=0, description="Read the norms of at most N trajectories."
    )
    verify_checksums: bool = Field(
        default=True, description="Compare every file with its checksum: reads the whole cache."
    )
    seed: int = Field(default=0, ge=0, description="Of the strips at random.")
    backbone: str | None = Field(
        default=None, description="Where transformer/ lies; default: --teacher, or as recorded."
    )

    @field_validator("num_strips", mode="before")
    @classmethod
    def _strips_of_text(cls, value: Any) -> Any:
        return count_of_strips(value) if isinstance(value, str) else value

    def scoring(self) -> CacheScoring:
        """How students are evaluated."""
        return CacheScoring(
            num_trajectories=self.num_trajectories,
            closed_loop=self.closed_loop,
            batch_size=self.batch_size,
            backbone_dtype=self.backbone_dtype,
        )
