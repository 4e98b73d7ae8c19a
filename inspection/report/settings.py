"""The options of `secondcast inspect report`."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from secondcast.evaluation.settings.cache_scoring import (
    TRAJECTORIES,
    BackboneCalls,
    CacheScoring,
    ClosedLoop,
    VaeFolder,
)
from secondcast.models.memory.options import SamplingMemory
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flag

_STRIPS = 64


def count_of_strips(text: str) -> int | None:
    """Parse a number of at least 0, or "all" as None; SettingsError for any other text."""
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit()):
        raise SettingsError(
            f"--num-strips is {text!r}, expected a number of trajectories such as 64, 0 for none, or all"
        )
    return int(text)


class ReportSettings(BackboneCalls, ClosedLoop, VaeFolder):
    """The options of a report. num_strips: None stands for all."""

    students: Annotated[tuple[Path, ...], Flag(flag="--student", metavar="RUN_OR_EXPORT")] = Field(
        default=(), description="Student to evaluate on held-out trajectories; may be repeated."
    )
    evaluations: Annotated[tuple[Path, ...], Flag(flag="--evaluation", metavar="FILE.json")] = Field(
        default=(), description="Evaluation of a student, written by `evaluate score --out`; may be repeated."
    )
    num_strips: Annotated[int | None, Flag(metavar="N", text=str(_STRIPS))] = Field(
        default=_STRIPS,
        ge=0,
        description="Number of film strips, half of them the hardest, half at random; 0: none; or all.",
    )
    num_frames: Annotated[int | None, Flag(metavar="N")] = Field(
        default=None, ge=1, description="Steps shown in a film strip; default: all."
    )
    frame_size: Annotated[int, Flag(metavar="PX")] = Field(
        default=96, ge=16, le=1024, description="Largest side of a frame of a film strip."
    )
    num_trajectories: Annotated[int, Flag(metavar="N")] = Field(
        default=TRAJECTORIES, ge=0, description="Held-out trajectories to evaluate students on; 0: none."
    )
    max_norms: Annotated[int, Flag(metavar="N")] = Field(
        default=5000, ge=0, description="Maximum number of trajectories whose norms are read."
    )
    verify_checksums: bool = Field(
        default=True, description="Compare every file with its checksum, which reads the whole cache."
    )
    seed: int = Field(default=0, ge=0, description="Seed for drawing random film strips, and for an untrained student.")
    backbone: str | None = Field(
        default=None, description="Teacher folder with transformer/; default: --teacher, or as recorded."
    )

    @field_validator("num_strips", mode="before")
    @classmethod
    def _strips_of_text(cls, value: Any) -> Any:
        return count_of_strips(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _the_baseline_is_sampled(self) -> Self:
        if self.random_baseline and not (self.students and self.num_trajectories and self.closed_loop):
            raise ValueError(
                f"--random-baseline has no effect with {len(self.students)} --student, --num-trajectories "
                f"{self.num_trajectories} and --closed-loop {self.closed_loop}: remove it, or give at least one of each"
            )
        return self

    def scoring(self) -> CacheScoring:
        """The evaluation options for students."""
        return CacheScoring(
            num_trajectories=self.num_trajectories,
            closed_loop=self.closed_loop,
            random_baseline=self.random_baseline,
            seed=self.seed,
            batch_size=self.batch_size,
            backbone_dtype=self.backbone_dtype,
            attention_backend=self.attention_backend,
            **{name: getattr(self, name) for name in SamplingMemory.model_fields},
        )
