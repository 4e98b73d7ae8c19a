"""What a training run is asked to do, validated."""

from typing import Literal, Self

from pydantic import Field, model_validator

from storage_schemas.manifest import Flags, Record
from trainer.training_set import TrainingSet

Loss = Literal["vision", "embedding", "context"]


class TrainSettings(Flags):
    """The flags of `understudy train`. Defaults are the paper's (section 4) where it states one.

    student: its name as given, for the record; where it lies on this machine is told apart from it.
    warmup_steps: optimizer steps with `warmup_loss` before the `steps` with `loss`.
    huber: where `loss` turns from a square into a line, in the units of what it compares; None: a square everywhere.
    step_weights: what the errors of the vision loss at step k are multiplied by, mean 1: see losses.step_weights.
    embedding_term: weight of the embedding loss beside the vision loss.
    batch_size: rows of one optimizer step; accumulate: equal parts of it that go through the networks one by one.
    steps_per_trajectory: rows of the vision loss that share one forward pass of the student.
    lr_warmup_steps: steps over which each stage's learning rate rises; None: 20 where it decays, else none.
    clip: largest norm of the gradient of all student parameters. position_bias_factor: multiplies the learning rate
    of T5's relative position bias, which carries the order of the words and learns slowly from a random start.
    ema: decay of the average of the student's parameters that is validated and exported; None: none.
    student_dtype: "auto" is bfloat16-autocast on a GPU where the cache's (or the backbone's) dtype is bfloat16.
    keep: last checkpoints that are kept besides the best.
    """

    student: str
    init: Literal["auto", "pretrained", "random"] = "auto"
    dropout: float = Field(default=0.1, ge=0, lt=1)
    steps: int = Field(default=1000, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    loss: Loss = "vision"
    warmup_loss: Literal["embedding", "context"] = "embedding"
    huber: float | None = Field(default=None, gt=0)
    step_weights: Literal["uniform", "sigma", "interval"] = "uniform"
    embedding_term: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=32, ge=1)
    accumulate: int = Field(default=1, ge=1)
    order: Literal["shuffled", "following"] = "shuffled"
    steps_per_trajectory: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    warmup_learning_rate: float | None = Field(default=None, gt=0)
    decay: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: int | None = Field(default=None, ge=0)
    weight_decay: float = Field(default=1e-3, ge=0)
    clip: float = Field(default=1.0, gt=0)
    position_bias_factor: float = Field(default=1.0, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    student_dtype: Literal["auto", "float32", "bfloat16-autocast"] = "auto"
    backbone_dtype: Literal["cache", "bfloat16", "float32"] = "cache"
    checkpoint_every: int = Field(default=200, ge=1)
    keep: int = Field(default=2, ge=1)
    validate_rows: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _has_steps(self) -> Self:
        if self.steps + self.warmup_steps == 0:
            raise ValueError("steps and warmup-steps are both 0, expected at least one of them above")
        return self

    @model_validator(mode="after")
    def _parts_are_equal(self) -> Self:
        unit = self.accumulate * self.steps_per_trajectory
        if self.batch_size % unit:
            raise ValueError(
                f"batch-size is {self.batch_size}, expected a multiple of accumulate x steps-per-trajectory = "
                f"{self.accumulate} x {self.steps_per_trajectory}: the parts of a batch are equal; "
                f"take {max(1, self.batch_size // unit) * unit}"
            )
        return self

    @model_validator(mode="after")
    def _order_can_share(self) -> Self:
        if self.order == "following" and self.steps_per_trajectory > 1:
            raise ValueError(
                f"steps-per-trajectory is {self.steps_per_trajectory} with order following, expected 1: it walks each "
                f"trajectory step by step, one of them in a batch; take order shuffled"
            )
        return self

    @model_validator(mode="after")
    def _vision_options_have_a_vision_loss(self) -> Self:
        if self.loss == "vision":
            return self
        for name in ("step_weights", "embedding_term", "steps_per_trajectory"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name.replace('_', '-')} is {getattr(self, name)} with loss {self.loss}: it is an option of the "
                    f"vision loss, which alone replays steps; leave it out, or take loss vision"
                )
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.warmup_steps + self.steps

    def loss_at(self, step: int) -> Loss:
        """Which loss optimizer step `step` minimises."""
        return self.warmup_loss if step < self.warmup_steps else self.loss

    @property
    def losses(self) -> set[Loss]:
        """The losses of the run's stages."""
        stages: list[tuple[int, Loss]] = [(self.warmup_steps, self.warmup_loss), (self.steps, self.loss)]
        return {loss for steps, loss in stages if steps}

    @property
    def needs_embeddings(self) -> bool:
        """Whether some step compares with the teacher's embeddings."""
        return self.losses != {"vision"} or self.embedding_term > 0

    @property
    def teacher_use(self) -> Literal["transformer", "context_embedder", "none"]:
        """What is read of the teacher's transformer: all of it, one linear, or nothing."""
        if "vision" in self.losses:
            return "transformer"
        return "context_embedder" if "context" in self.losses else "none"

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
