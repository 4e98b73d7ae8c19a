"""The record of an evaluation against a cache: every number by trajectory and step, for tables, heat maps, reports."""

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.schema.manifest import Dtype, Quantization, Record, first_problem

Rows = tuple[tuple[float, ...], ...]
"""[N][K]: a value of each trajectory and step."""


class Evaluated(Record):
    """A held-out trajectory; guidance is None where the backbone takes none."""

    key: str
    prompt: str
    sources: tuple[str, ...] = Field(min_length=1)
    guidance: float | None


class StepErrors(Record):
    """Errors of predictions against the cached velocity, [N][K].

    error_fraction: norm of the difference per norm of the velocity. mean_square: mean squared difference, the loss of
    training.
    """

    error_fraction: Rows
    mean_square: Rows


class SampledResult(Record):
    """Where sampling ends that a text encoder led, against where the teacher's ended, one value per trajectory.

    latent_fraction: norm of the difference of the final latents per norm of the teacher's. psnr_db: None where the
    pictures are identical (PSNR is infinite). lpips: None where it was not measured.
    """

    latent_fraction: tuple[float, ...]
    psnr_db: tuple[float | None, ...]
    ssim: tuple[float, ...]
    lpips: tuple[float, ...] | None


class ClosedLoop(Record):
    """Sampling led from the cached noise. trajectories: places in `Evaluation.trajectories`.

    leaders: "student"; "teacher", its cached embedding (the replay error); "untrained".
    """

    trajectories: tuple[int, ...] = Field(min_length=1)
    text_encoders: dict[str, SampledResult]


class Computed(Record):
    """By what an evaluation was computed; values depend on it in their last digits."""

    dtype: Dtype
    quantize: Quantization
    attention: str
    device: str
    batch_size: int = Field(ge=1)
    torch: str


class Evaluation(Record):
    """A student against held-out trajectories of a cache.

    student_digest: of weights, configuration and tokenizer; earlier versions noted one of its weights alone.
    sampling_digest, teacher_digest: the cache's. committed, held_out: trajectories of the cache then. steps: which of
    its K, with the sigma of each. replay error: the errors of the teacher's cached embedding; None where the cache has none.
    closed_loop: None where none was asked for, or it has not been through.
    """

    format: Literal["secondcast-evaluation"] = "secondcast-evaluation"
    format_version: Literal[1] = 1
    created_by: str
    student: str
    student_digest: str
    cache: str
    sampling_digest: str
    teacher_digest: str
    backbone: str
    computed: Computed
    committed: int = Field(ge=1)
    held_out: int = Field(ge=1)
    steps: tuple[int, ...] = Field(min_length=1)
    sigmas: tuple[float, ...]
    trajectories: tuple[Evaluated, ...] = Field(min_length=1)
    errors: StepErrors
    replay_error: StepErrors | None
    closed_loop: ClosedLoop | None

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        rows, steps = len(self.trajectories), len(self.steps)
        if len(self.sigmas) != steps:
            raise ValueError(f"steps are {steps}, sigmas are {len(self.sigmas)}: expected as many")
        for errors in (self.errors, self.replay_error):
            for values in () if errors is None else (errors.error_fraction, errors.mean_square):
                if len(values) != rows or {len(row) for row in values} != {steps}:
                    raise ValueError(f"errors are not of {counted(rows, 'trajectory')} times {counted(steps, 'step')}")
        if self.closed_loop is not None:
            self._check_closed_loop(self.closed_loop)
        return self

    def _check_closed_loop(self, closed: ClosedLoop) -> None:
        if not all(0 <= place < len(self.trajectories) for place in closed.trajectories):
            raise ValueError(f"the closed loop names trajectories beyond the {len(self.trajectories)} there are")
        for name, led in closed.text_encoders.items():
            columns = (led.latent_fraction, led.psnr_db, led.ssim, *(() if led.lpips is None else (led.lpips,)))
            if {len(column) for column in columns} != {len(closed.trajectories)}:
                raise ValueError(f"what {name} led has not one value per trajectory of {len(closed.trajectories)}")

    def encode(self) -> bytes:
        """As JSON."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    def write(self, path: Path) -> None:
        """Write it to a file, whole or not at all; SettingsError if that is not possible."""
        try:
            durable.replace(path, self.encode())
        except OSError as error:
            raise SettingsError(f"{path} cannot be written ({error.strerror}): give another --out") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` wrote; SettingsError for a file that is something else."""
        try:
            body = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise SettingsError(f"no file {path}: expected what `secondcast evaluate score --out` wrote") from error
        except (OSError, ValueError, RecursionError) as error:
            raise SettingsError(
                f"{path} is not readable JSON: expected what `secondcast evaluate score --out` wrote"
            ) from error
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise SettingsError(
                f"{path} is no evaluation that this version reads ({first_problem(error)}): expected what "
                f"`secondcast evaluate score --out` wrote; evaluate again"
            ) from error
