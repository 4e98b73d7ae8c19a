"""What a training run is asked to do, validated."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from secondcast.models.memory.options import MemoryOptions
from secondcast.models.teacher.hub import split_revision
from secondcast.storage_schemas.schema.manifest import Manifest, Record, ScheduleName
from secondcast.trainer.stage import LARGEST, LARGEST_FACTOR, LARGEST_RATE, Loss, Stage, StageOptions
from secondcast.trainer.training_set import TrainingSet

WARM_UP = "warm-up"
MAIN = "main"


class _OfTheRun(MemoryOptions):
    """What holds for all stages of a run. Defaults are the paper's (section 4) where it states one.

    student: its name as given, for the record; where it lies on this machine is told apart from it.
    clip: largest norm of the gradient of all student parameters. position_bias_factor: multiplies the learning rate
    of T5's relative position bias, which carries the order of the words and learns slowly from a random start.
    ema: decay of the average of the student's parameters that is validated and exported; None: none.
    attention_backend: diffusers' name of how the transformer computes attention; None: its default.
    student_dtype: "auto" is bfloat16-autocast on a GPU where the cache's (or the backbone's) dtype is bfloat16.
    checkpoint_every: steps between checkpoints with a validation. checkpoint_minutes: after so long without any there
    is one without. keep: last checkpoints that are kept besides the best. floor: records of which the replay floor is
    measured.
    """

    student: str
    init: Literal["auto", "pretrained", "random"] = "auto"
    dropout: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=1e-3, ge=0, le=LARGEST_FACTOR)
    clip: float = Field(default=1.0, gt=0, le=LARGEST)
    position_bias_factor: float = Field(default=1.0, gt=0, le=LARGEST_FACTOR)
    ema: float | None = Field(default=None, gt=0, lt=1)
    student_dtype: Literal["auto", "float32", "bfloat16-autocast"] = "auto"
    backbone_dtype: Literal["cache", "bfloat16", "float32"] = "cache"
    attention_backend: str | None = None
    checkpoint_every: int = Field(default=200, ge=1)
    checkpoint_minutes: float = Field(default=30.0, gt=0)
    keep: int = Field(default=2, ge=1)
    validate_rows: int = Field(default=64, ge=1)
    floor: int = Field(default=64, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @property
    def memory(self) -> MemoryOptions:
        """How the backbone is held and computed."""
        return MemoryOptions(**{name: getattr(self, name) for name in MemoryOptions.model_fields})


class TrainSettings(_OfTheRun):
    """A run: what holds for all of it, and its stages one after the other. What a recipe states.

    budget_seconds: what stages with a budget_share share; None where there is none.
    """

    stages: tuple[Stage, ...] = Field(min_length=1)
    budget_seconds: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _stages_have_names_of_their_own(self) -> Self:
        names = [stage.name for stage in self.stages]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two stages are named {twice!r}, expected a name for each")
        return self

    @model_validator(mode="after")
    def _the_budget_is_shared(self) -> Self:
        shares = {stage.name: stage.budget_share for stage in self.stages if stage.budget_share is not None}
        if shares and self.budget_seconds is None:
            raise ValueError(
                f"stage {min(shares)} takes a share of a budget that is not given: give --budget, as in 72h"
            )
        if not shares and self.budget_seconds is not None:
            raise ValueError("--budget is given, but no stage has a budget-share: state one in a recipe")
        if sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"the stages share {sum(shares.values()):g} of the budget, expected at most 1")
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(stage.length for stage in self.stages)

    @property
    def ends(self) -> list[int]:
        """How many optimizer steps are done at the end of each stage."""
        return [sum(stage.length for stage in self.stages[: n + 1]) for n in range(len(self.stages))]

    def place(self, step: int) -> tuple[int, int]:
        """Number of the stage of optimizer step `step`, and the step's number within it."""
        for number, (stage, end) in enumerate(zip(self.stages, self.ends, strict=True)):
            if step < end:
                return number, step - end + stage.length
        raise ValueError(f"step is {step}, expected 0 to {self.total_steps - 1}")

    def stage_at(self, step: int) -> Stage:
        """The stage of an optimizer step."""
        return self.stages[self.place(step)[0]]

    @property
    def losses(self) -> set[Loss]:
        """The losses of the run's stages."""
        return {stage.loss for stage in self.stages}

    @property
    def teacher_use(self) -> Literal["transformer", "context_embedder", "none"]:
        """What is read of the teacher's transformer: all of it, one linear, or nothing."""
        if "vision" in self.losses:
            return "transformer"
        return "context_embedder" if "context" in self.losses else "none"

    def checkpoint_steps(self, stage: Stage) -> int:
        """Steps of a stage between two checkpoints with a validation."""
        return stage.checkpoint_every or self.checkpoint_every

    def is_checkpoint(self, done: int) -> bool:
        """Whether a checkpoint with a validation stands behind the first `done` steps."""
        number, step_of_stage = self.place(done - 1)
        stage = self.stages[number]
        # Those of a stage's own are counted from its beginning, the others from that of the run.
        counted = done if stage.checkpoint_every is None else step_of_stage + 1
        return done in self.ends or counted % self.checkpoint_steps(stage) == 0

    def flat(self) -> dict[str, Any]:
        """All values by the names that people give them: `learning_rate`, or `warm-up learning_rate` of a stage."""
        values = self.json_value()
        stages = values.pop("stages")
        values["stages"] = ", ".join(stage["name"] for stage in stages)
        for stage in stages:
            spoken = "" if stage["name"] == MAIN else f"{stage['name']} "
            values |= {f"{spoken}{key}": value for key, value in stage.items() if key != "name"}
        return values

    @property
    def batch_rows(self) -> int:
        """Most rows that go through the networks at once in training."""
        return max(stage.batch_size // stage.accumulate for stage in self.stages)

    @property
    def replay_rows(self) -> int:
        """Most rows that go through the backbone at once in training."""
        return max(stage.batch_size // stage.accumulate for stage in self.stages if stage.loss == "vision")


class TrainFlags(_OfTheRun, StageOptions):
    """The flags of `secondcast train`: a warm-up, if asked for, and the stage after it.

    warmup_steps: optimizer steps with `warmup_loss` before the `steps` with `loss`.
    """

    steps: int = Field(default=1000, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    warmup_loss: Literal["embedding", "context"] = "context"
    warmup_learning_rate: float | None = Field(default=None, gt=0, le=LARGEST_RATE)

    @model_validator(mode="after")
    def _has_steps(self) -> Self:
        if self.steps + self.warmup_steps == 0:
            raise ValueError("steps and warmup-steps are both 0, expected at least one of them above")
        return self

    def settings(self) -> TrainSettings:
        """The same run as stages."""
        options = {name: getattr(self, name) for name in StageOptions.model_fields}
        shared = {name: options[name] for name in ("batch_size", "accumulate", "decay", "lr_warmup_steps")}
        rate = self.warmup_learning_rate or self.learning_rate
        stages = []
        if self.warmup_steps:
            warm_up = {"steps": self.warmup_steps, "loss": self.warmup_loss, "learning_rate": rate}
            stages.append(Stage(name=WARM_UP, **shared | warm_up))
        if self.steps:
            stages.append(Stage(name=MAIN, steps=self.steps, **options))
        run = {name: getattr(self, name) for name in _OfTheRun.model_fields}
        return TrainSettings(**run, stages=tuple(stages))


class TrainedOn(Record):
    """A cache of a run: where it lay, what it is by its digest, and the trajectories of it that are trained on."""

    location: str
    sampling_digest: str
    training_set: TrainingSet


class RecordedWith(Record):
    """How the first cache of a run was recorded, and so how pictures with its student are made.

    teacher: the name that the build was given.
    """

    teacher: str
    height: int
    width: int
    steps: int
    schedule: ScheduleName
    dtype: Literal["bfloat16", "float32"]

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """What a cache's manifest says of it."""
        sampling = manifest.sampling
        return cls(
            teacher=split_revision(manifest.source)[0],
            height=sampling.height,
            width=sampling.width,
            steps=sampling.steps,
            schedule=sampling.schedule,
            dtype=sampling.dtype,
        )


class RunConfig(Record):
    """What RUN/config.json holds: the settings, and which caches they were for.

    id: what the run's checkpoints name it, by all that their weights depend on.
    guidance: all values that the caches were recorded with, ascending; None where the teacher takes none.
    recorded: None in runs of versions that did not write it.
    """

    settings: TrainSettings
    caches: dict[str, TrainedOn]
    backbone: str
    teacher_digest: str
    text_length: int
    text_width: int
    guidance: tuple[float, ...] | None = None
    id: str = ""
    recorded: RecordedWith | None = None
