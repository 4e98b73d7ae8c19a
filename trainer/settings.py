"""Validated settings of a training run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from secondcast.models.memory.options import BackboneCall, MemoryOptions
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.schema.flags import Flag
from secondcast.trainer.loss_kinds import LOSSES, Loss
from secondcast.trainer.stage import (
    LARGEST,
    LARGEST_FACTOR,
    LARGEST_RATE,
    OBJECTIVE,
    OPTIMIZER,
    Stage,
    StageOptions,
)

PRETRAIN = "pretrain"
MAIN = "main"
STUDENT, CHECKPOINTS = "Student", "Checkpoints"
"""Headings of options in help texts."""


_LATER = ("projection_rank", "loss_fn")


class RunOptions(MemoryOptions, BackboneCall):
    """Options of all stages of a run, except the student. Defaults are the paper's (section 4) where it states one.

    position_bias_lr_scale: T5's relative position bias encodes the word order, and learns slowly from a random start.
    attention_backend: diffusers' name; None: its default.
    """

    init: Annotated[Literal["auto", "pretrained", "random"], Flag(group=STUDENT)] = Field(
        default="auto", description="Initial weights of the student; auto: pretrained if available, else random."
    )
    dropout: Annotated[float, Flag(group=STUDENT)] = Field(
        default=0.1, ge=0, lt=1, description="Dropout probability of the student during training."
    )
    projection_rank: Annotated[int | None, Flag(group=STUDENT)] = Field(
        default=None,
        ge=1,
        description="Rank of the last matrix of a new output projection, for a smaller student; default: full.",
    )
    student_dtype: Annotated[Literal["auto", "float32", "bfloat16-autocast"], Flag(group=STUDENT, rare=True)] = Field(
        default="auto",
        description="Compute dtype of the student (weights stay float32); auto: bfloat16 autocast on a GPU.",
    )
    weight_decay: Annotated[float, Flag(group=OPTIMIZER, rare=True)] = Field(
        default=1e-3, ge=0, le=LARGEST_FACTOR, description="Weight decay of AdamW."
    )
    max_grad_norm: Annotated[float, Flag(group=OPTIMIZER)] = Field(
        default=1.0, gt=0, le=LARGEST, description="Maximum gradient norm of the student, for clipping."
    )
    position_bias_lr_scale: Annotated[float, Flag(group=OPTIMIZER, rare=True)] = Field(
        default=1.0, gt=0, le=LARGEST_FACTOR, description="Factor on the learning rate of T5's position bias."
    )
    ema_decay: Annotated[float | None, Flag(group=OPTIMIZER)] = Field(
        default=None, gt=0, lt=1, description="Decay of an EMA of the weights, which is validated and exported."
    )
    checkpoint_every: Annotated[int, Flag(group=CHECKPOINTS)] = Field(
        default=200, ge=1, description="Number of steps between checkpoints; each runs a validation."
    )
    checkpoint_minutes: Annotated[float, Flag(group=CHECKPOINTS, rare=True)] = Field(
        default=30.0,
        gt=0,
        description="Maximum minutes between checkpoints; an extra one runs no validation.",
    )
    keep_checkpoints: Annotated[int, Flag(group=CHECKPOINTS)] = Field(
        default=2, ge=1, description="Number of latest checkpoints to keep, in addition to the best."
    )
    validate_rows: Annotated[int, Flag(hidden=True)] = Field(default=64, ge=1)
    replay_check: Annotated[int, Flag(group=CHECKPOINTS)] = Field(
        default=64, ge=0, description="Number of records to measure the replay error on at the start; 0: none."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed for the data order, dropout and random weights.")
    deterministic: Annotated[bool, Flag(rare=True)] = Field(
        default=False,
        description="Use deterministic kernels on a GPU, so that a resumed run ends with the same bits; slower.",
    )

    @model_serializer(mode="wrap")
    def _without_what_is_unset(self, plain: SerializerFunctionWrapHandler) -> Any:
        # Runs from before these choices existed do not have the keys, and keep their ids.
        value = plain(self)
        return {key: one for key, one in value.items() if one is not None or key not in _LATER}

    @property
    def memory(self) -> MemoryOptions:
        """The memory options of the backbone."""
        return MemoryOptions(**{name: getattr(self, name) for name in MemoryOptions.model_fields})


@dataclass(frozen=True, kw_only=True)
class StepOfStage:
    """An optimizer step: its number in the run, its stage, the stage's number, and its position in the stage."""

    step: int
    stage: Stage
    number: int
    position: int


class TrainSettings(RunOptions):
    """A run: shared options and consecutive stages, as in a recipe.

    student: name of the student as given, for the record; its path on this machine is separate.
    time_budget_seconds: time for the stages with a budget_share; None without such stages.
    loss_fn: name of the function of the user that takes the place of the vision loss, for the record.
    """

    student: str
    stages: tuple[Stage, ...] = Field(min_length=1)
    time_budget_seconds: float | None = Field(default=None, gt=0)
    loss_fn: str | None = None

    @model_validator(mode="after")
    def _stages_have_names_of_their_own(self) -> Self:
        names = [stage.name for stage in self.stages]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two stages are named {twice!r}, expected unique names")
        return self

    @model_validator(mode="after")
    def _the_budget_is_shared(self) -> Self:
        shares = {stage.name: stage.budget_share for stage in self.stages if stage.budget_share is not None}
        if shares and self.time_budget_seconds is None:
            raise ValueError(
                f"stage {min(shares)} has a budget-share, but no time budget is given: give --time-budget, such as 72h"
            )
        if not shares and self.time_budget_seconds is not None:
            raise ValueError("--time-budget is given, but no stage has a budget-share: set one in a recipe")
        if sum(shares.values()) > 1 + 1e-9:
            raise ValueError(f"the stages share {sum(shares.values()):g} of the budget, expected at most 1")
        return self

    def check_names(self, names: Sequence[str]) -> None:
        """Raise SettingsError for a cache that a stage names but the run lacks, or that no stage uses."""
        for stage in self.stages:
            if missing := [name for name in stage.caches or {} if name not in names]:
                raise SettingsError(
                    f"stage {stage.name} uses the cache {missing[0]!r}, but this run has {', '.join(names)}: give "
                    f"--cache {missing[0]}=FOLDER"
                )
        if all(stage.caches for stage in self.stages):
            wanted = {name for stage in self.stages for name in stage.caches or {}}
            if idle := [name for name in names if name not in wanted]:
                raise SettingsError(
                    f"cache {idle[0]!r} is given, but no stage uses it: add it to a stage, or remove it"
                )

    def check_depth(self, blocks: int) -> None:
        """Raise SettingsError for a stage that runs more blocks than the transformer has."""
        for stage in self.stages:
            if stage.loss == "depth" and stage.depth_blocks > blocks:
                depth = stage.depth_blocks
                named = "--depth-blocks is" if stage.name == MAIN else f"stage {stage.name} has depth-blocks"
                raise SettingsError(
                    f"{named} {depth}, expected 1 to {blocks}, the number of blocks of this transformer: use {blocks}"
                )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return sum(stage.length for stage in self.stages)

    @property
    def ends(self) -> list[int]:
        """Number of finished optimizer steps at the end of each stage."""
        return [sum(stage.length for stage in self.stages[: n + 1]) for n in range(len(self.stages))]

    def at(self, step: int) -> "StepOfStage":
        """Optimizer step `step` of the run, from 0, with its stage."""
        for number, (stage, end) in enumerate(zip(self.stages, self.ends, strict=True)):
            if step < end:
                return StepOfStage(step=step, stage=stage, number=number, position=step - end + stage.length)
        raise ValueError(f"step is {step}, expected 0 to {self.total_steps - 1}")

    @property
    def losses(self) -> set[Loss]:
        """The losses of the run's stages."""
        return {stage.loss for stage in self.stages}

    @property
    def replays(self) -> bool:
        """Whether a stage trains through blocks of the backbone."""
        return any(stage.replays for stage in self.stages)

    @property
    def predicts(self) -> bool:
        """Whether a stage trains through the whole backbone."""
        return any(stage.predicts for stage in self.stages)

    @property
    def depths(self) -> list[int]:
        """The numbers of blocks after which stages compare streams, ascending."""
        return sorted({stage.depth_blocks for stage in self.stages if stage.loss == "depth"})

    @property
    def loaded_blocks(self) -> int | None:
        """Number of the backbone's first blocks that are loaded, of a run that replays; None: the whole backbone."""
        return None if self.predicts else max(self.depths, default=None)

    @property
    def projects(self) -> bool:
        """Whether a stage needs the backbone's text projection alone."""
        return any(
            LOSSES[stage.loss].backbone == "text projection" or stage.context_loss_weight for stage in self.stages
        )

    @property
    def teacher_use(self) -> Literal["transformer", "context_embedder", "none"]:
        """What is read of the teacher's transformer: all or its first blocks, one linear, or nothing."""
        if self.replays:
            return "transformer"
        return "context_embedder" if self.projects else "none"

    def checkpoint_steps(self, stage: Stage) -> int:
        """Number of steps of a stage between two checkpoints with a validation."""
        return stage.checkpoint_every or self.checkpoint_every

    def is_checkpoint(self, done: int) -> bool:
        """Whether a checkpoint with a validation follows the first `done` steps."""
        last = self.at(done - 1)
        # A stage's own checkpoint_every counts from the start of the stage, the run's from the start of the run.
        counted = done if last.stage.checkpoint_every is None else last.position + 1
        return done in self.ends or counted % self.checkpoint_steps(last.stage) == 0

    def flat(self) -> dict[str, Any]:
        """All values by name: `learning_rate`, or `STAGE learning_rate` for a stage other than the main one."""
        values = self.json_value()
        stages = values.pop("stages")
        values["stages"] = ", ".join(stage["name"] for stage in stages)
        for stage in stages:
            spoken = "" if stage["name"] == MAIN else f"{stage['name']} "
            values |= {f"{spoken}{key}": value for key, value in stage.items() if key != "name"}
        return values

    @property
    def batch_rows(self) -> int:
        """Maximum number of rows in a forward pass during training."""
        return max(stage.batch_size // stage.grad_accum_steps for stage in self.stages)

    @property
    def replay_rows(self) -> int:
        """Maximum number of rows in a forward pass of the backbone during training."""
        return max(stage.batch_size // stage.grad_accum_steps for stage in self.stages if stage.replays)


class TrainOptions(RunOptions, StageOptions):
    """The options of `train` and `plan train`: optional pretraining, and the stage after it."""

    to_be_chosen: ClassVar[bool] = True

    steps: int = Field(default=1000, ge=0, description="Number of optimizer steps with --loss.")
    pretrain_steps: int = Field(
        default=0, ge=0, description="Number of pretraining steps with --pretrain-loss before --steps."
    )
    pretrain_loss: Annotated[Literal["embedding", "context"], Flag(group=OBJECTIVE)] = Field(
        default="context", description="Loss of pretraining: embedding or context; compared in docs/experiments.md."
    )
    pretrain_lr: Annotated[float | None, Flag(group=OPTIMIZER, rare=True)] = Field(
        default=None, gt=0, le=LARGEST_RATE, description="Learning rate of pretraining. Default: --learning-rate."
    )

    @model_validator(mode="after")
    def _has_steps(self) -> Self:
        if self.steps + self.pretrain_steps == 0:
            raise ValueError("steps and pretrain-steps are both 0, expected at least one above 0")
        return self


class TrainFlags(TrainOptions):
    """The options of `train` and a student: a whole run."""

    to_be_chosen: ClassVar[bool] = False

    student: str

    def settings(self) -> TrainSettings:
        """The same run as stages."""
        options = {name: getattr(self, name) for name in StageOptions.model_fields}
        shared = {name: options[name] for name in ("batch_size", "grad_accum_steps", "lr_schedule", "lr_warmup_steps")}
        rate = self.pretrain_lr or self.learning_rate
        stages = []
        if self.pretrain_steps:
            pretraining = {"steps": self.pretrain_steps, "loss": self.pretrain_loss, "learning_rate": rate}
            stages.append(Stage(name=PRETRAIN, **shared | pretraining))
        if self.steps:
            stages.append(Stage(name=MAIN, steps=self.steps, **options))
        run = {name: getattr(self, name) for name in RunOptions.model_fields}
        return TrainSettings(student=self.student, **run, stages=tuple(stages))
