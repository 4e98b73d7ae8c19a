"""What RUN/config.json states: the settings of a run, the caches that it trains on, and what was measured of them."""

from typing import Self

from pydantic import Field

from secondcast.models.families.flux import FLUX
from secondcast.models.teacher.hub import split_revision
from secondcast.storage_schemas.schema.json_files import Record
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.recording import Dtype, ScheduleName
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.training_set import TrainingSet


class TrainedOn(Record):
    """A cache of a run: its location, the digest of its recording, and the rows that are trained on."""

    location: str
    sampling_digest: str
    training_set: TrainingSet


class RecordedWith(Record):
    """How the first cache with trajectories of a run was recorded; pictures with its student use the same settings.

    teacher: the name given to the build.
    family: of the teacher; runs of older versions are of the first one.
    """

    teacher: str
    family: str = FLUX.name
    height: int
    width: int
    steps: int
    schedule: ScheduleName
    dtype: Dtype

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The values of a cache's manifest."""
        sampling = manifest.sampling
        return cls(
            teacher=split_revision(manifest.source)[0],
            family=manifest.teacher.family,
            height=sampling.height,
            width=sampling.width,
            steps=sampling.steps,
            schedule=sampling.schedule,
            dtype=sampling.dtype,
        )


class StreamVariances(Record):
    """Variances between prompts of both streams after the first `blocks` blocks: see losses/depth.py."""

    blocks: int
    hidden_states: float = Field(gt=0, allow_inf_nan=False)
    encoder_hidden_states: float = Field(gt=0, allow_inf_nan=False)


class RunConfig(Record):
    """Contents of RUN/config.json: the settings and the caches of a run.

    id: identifier that the run's checkpoints state, a digest of everything that their weights depend on.
    guidance: all guidance values of the caches, ascending; None if the teacher takes none.
    family: of the teacher; runs of older versions are of the first one.
    recorded: None in runs on text caches alone, and of older versions.
    stream_variances: of each number of blocks after which a stage compares streams.
    """

    settings: TrainSettings
    caches: dict[str, TrainedOn]
    backbone: str
    teacher_digest: str
    text_length: int
    text_width: int
    guidance: tuple[float, ...] | None = None
    id: str = ""
    family: str = FLUX.name
    recorded: RecordedWith | None = None
    stream_variances: tuple[StreamVariances, ...] = ()
