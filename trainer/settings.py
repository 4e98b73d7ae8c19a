"""What a training run is asked to do, validated."""

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from storage_schemas.errors import BadSettings
from storage_schemas.manifest import Record, first_wrong_flag
from trainer.training_set import TrainingSet


class TrainSettings(Record):
    """The flags of `understudy train`. Defaults are the paper's (section 4) where it states one.

    student: its name as given, for the record; where it lies on this machine is told apart from it.
    warmup_steps: optimizer steps with the embedding loss before the `steps` with the vision loss.
    clip: largest norm of the gradient of all student parameters. position_bias_factor: multiplies the learning rate
    of T5's relative position bias, which carries the order of the words and learns slowly from a random start.
    """

    student: str
    init: Literal["auto", "pretrained", "random"] = "auto"
    dropout: float = Field(default=0.1, ge=0, lt=1)
    steps: int = Field(default=1000, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    batch_size: int = Field(default=32, ge=1)
    order: Literal["shuffled", "following"] = "shuffled"
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup_learning_rate: float | None = Field(default=None, gt=0)
    decay: Literal["constant", "cosine"] = "constant"
    weight_decay: float = Field(default=1e-3, ge=0)
    clip: float = Field(default=1.0, gt=0)
    position_bias_factor: float = Field(default=1.0, gt=0)
    backbone_dtype: Literal["cache", "bfloat16", "float32"] = "cache"
    checkpoint_every: int = Field(default=200, ge=1)
    validate_rows: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _has_steps(self) -> Self:
        if self.steps + self.warmup_steps == 0:
            raise ValueError("steps and warmup-steps are both 0, expected at least one of them above")
        return self

    @classmethod
    def from_flags(cls, **flags: Any) -> Self:
        """Validate flags; BadSettings names the first one that is wrong."""
        try:
            return cls(**flags)
        except ValidationError as error:
            raise BadSettings(first_wrong_flag(error)) from error

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.warmup_steps + self.steps

    def loss_at(self, step: int) -> Literal["embedding", "vision"]:
        """Which loss optimizer step `step` minimises."""
        return "embedding" if step < self.warmup_steps else "vision"

    def stage_position(self, step: int) -> tuple[int, int]:
        """Number of the step within its stage, and the stage's length."""
        if step < self.warmup_steps:
            return step, self.warmup_steps
        return step - self.warmup_steps, self.steps


class RunConfig(Record):
    """What RUN/config.json holds: the settings, and which cache they were for.

    training_set: None in runs from before it was written down, until they go on.
    """

    settings: TrainSettings
    cache: str
    backbone: str
    teacher_digest: str
    sampling_digest: str
    text_length: int
    text_width: int
    training_set: TrainingSet | None = None
    guidance: tuple[float, ...] | None = None
