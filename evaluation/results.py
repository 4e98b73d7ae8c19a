"""The record of an evaluation on a cache: every value by trajectory and step, for tables, heat maps and reports."""

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.problems import first_problem
from secondcast.storage_schemas.schema.recording import Dtype, Quantization

Rows = tuple[tuple[float, ...], ...]
"""[N][K]: a value for each trajectory and step."""


class Evaluated(Record):
    """A held-out trajectory; guidance is None where the backbone takes none."""

    key: str
    prompt: str
    sources: tuple[str, ...] = Field(min_length=1)
    guidance: float | None


class StepErrors(Record):
    """Errors of predictions against the cached velocity, [N][K].

    error_fraction: norm of the difference / norm of the velocity.
    mean_square: mean squared difference, the training loss.
    """

    error_fraction: Rows
    mean_square: Rows


class SampledResult(Record):
    """Samples with a text encoder compared with the teacher's, one value per trajectory.

    latent_fraction: norm of the difference of the final latents / norm of the teacher's.
    psnr_db: None if the images are identical (PSNR is infinite).
    lpips: None if not measured.
    """

    latent_fraction: tuple[float, ...]
    psnr_db: tuple[float | None, ...]
    ssim: tuple[float, ...]
    lpips: tuple[float, ...] | None


class ClosedLoop(Record):
    """Results of sampling from the cached noise.

    trajectories: positions in `Evaluation.trajectories`.
    text_encoders: "student"; "teacher", its cached embedding (the replay error); "untrained".
    """

    trajectories: tuple[int, ...] = Field(min_length=1)
    text_encoders: dict[str, SampledResult]


class Computed(Record):
    """How an evaluation was computed, on which the last digits of its values depend."""

    dtype: Dtype
    quantize: Quantization
    attention: str
    device: str
    batch_size: int = Field(ge=1)
    torch: str


class Evaluation(Record):
    """Evaluation of a student on held-out trajectories of a cache.

    student_digest: digest of weights, configuration and tokenizer; of the weights alone in earlier versions.
    sampling_digest, teacher_digest: digests of the cache.
    committed, held_out: number of trajectories of the cache at that time.
    steps: evaluated steps, with the sigma of each in `sigmas`.
    replay_error: errors of the teacher's cached embedding; None if the cache has no embeddings.
    closed_loop: None if not requested, or not finished.
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
            raise ValueError(
                f"found {counted(steps, 'step')} and {counted(len(self.sigmas), 'sigma')}, expected equal numbers"
            )
        for errors in (self.errors, self.replay_error):
            for values in () if errors is None else (errors.error_fraction, errors.mean_square):
                if len(values) != rows or {len(row) for row in values} != {steps}:
                    raise ValueError(f"errors are not of {counted(rows, 'trajectory')} times {counted(steps, 'step')}")
        if self.closed_loop is not None:
            self._check_closed_loop(self.closed_loop)
        return self

    def _check_closed_loop(self, closed: ClosedLoop) -> None:
        if not all(0 <= place < len(self.trajectories) for place in closed.trajectories):
            raise ValueError(f"closed_loop has a trajectory outside the {len(self.trajectories)} of the evaluation")
        for name, result in closed.text_encoders.items():
            lpips = () if result.lpips is None else (result.lpips,)
            columns = (result.latent_fraction, result.psnr_db, result.ssim, *lpips)
            if {len(column) for column in columns} != {len(closed.trajectories)}:
                raise ValueError(f"closed_loop of {name}: expected one value for each of {len(closed.trajectories)}")

    def encode(self) -> bytes:
        """As JSON."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    def write(self, path: Path) -> None:
        """Write it to a file atomically; SettingsError if that fails."""
        try:
            durable.replace(path, self.encode())
        except OSError as error:
            raise SettingsError(f"{path} cannot be written ({error.strerror}): give another --out") from error

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file written by `write`; SettingsError for any other file."""
        try:
            body = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise SettingsError(f"no file {path}: expected the output of `secondcast evaluate score --out`") from error
        except (OSError, ValueError, RecursionError) as error:
            raise SettingsError(
                f"{path} is not readable JSON: expected the output of `secondcast evaluate score --out`"
            ) from error
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise SettingsError(
                f"{path} is not an evaluation that this version can read ({first_problem(error)}): expected the output "
                f"of `secondcast evaluate score --out`; evaluate again"
            ) from error
