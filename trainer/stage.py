"""A stage of a run: so many optimizer steps with one loss, one order and one learning rate, on some of the caches."""

from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from secondcast.storage_schemas.schema.flags import Flags, Shown
from secondcast.trainer.loss_kinds import LOSSES, LOSSES_HELP, Loss

LARGEST, LARGEST_FACTOR, LARGEST_RATE = 1e12, 1e6, 1e30
"""Of weights in a loss, of what a learning rate is multiplied with, of learning rates: all are finite in float32."""
StepWeights = Literal["uniform", "sigma", "interval"]
OrderKind = Literal["shuffled", "sequential"]
OBJECTIVE, DATA, OPTIMIZER = "Loss", "Data", "Optimizer"
"""Headings of options in help texts."""


class StageOptions(Flags):
    """How a stage trains.

    huber_delta: where `loss` turns from a square into a line, in the units of what it compares; None: a square everywhere.
    timestep_weighting: what the errors of the vision loss at step k are multiplied by, mean 1: see losses.timestep_weighting.
    embedding_loss_weight: weight of the embedding loss beside the vision loss.
    batch_size: rows of one optimizer step; accumulate: equal parts of it that go through the networks one by one.
    timesteps_per_sample: rows of the vision loss that share one forward pass of the student.
    lr_warmup_steps: steps over which the learning rate rises; None: 20 where it decays, else none.
    """

    loss: Annotated[Loss, Shown(group=OBJECTIVE)] = Field(
        default="vision",
        description=LOSSES_HELP,
    )
    huber_delta: Annotated[float | None, Shown(group=OBJECTIVE, rare=True)] = Field(
        default=None,
        gt=0,
        le=LARGEST,
        description="--loss grows as a line, not a square, where a difference is above this.",
    )
    timestep_weighting: Annotated[StepWeights, Shown(group=OBJECTIVE, rare=True)] = Field(
        default="uniform",
        description="Weight of a step in the vision loss: uniform is the paper's; sigma; its distance in sigma.",
    )
    embedding_loss_weight: Annotated[float, Shown(group=OBJECTIVE, rare=True)] = Field(
        default=0.0, ge=0, le=LARGEST, description="Weight of the embedding loss beside the vision loss."
    )
    batch_size: Annotated[int, Shown(group=DATA)] = Field(default=32, ge=1, description="Rows of an optimizer step.")
    grad_accum_steps: Annotated[int, Shown(group=DATA)] = Field(
        default=1, ge=1, description="Equal parts of the batch, computed one by one: less memory."
    )
    data_order: Annotated[OrderKind, Shown(group=DATA)] = Field(
        default="shuffled", description="sequential: the paper's."
    )
    timesteps_per_sample: Annotated[int, Shown(group=DATA, rare=True)] = Field(
        default=1,
        ge=1,
        description="Rows of the batch that are steps of one trajectory and share the student's forward.",
    )
    learning_rate: Annotated[float, Shown(group=OPTIMIZER)] = Field(
        default=1e-4, gt=0, le=LARGEST_RATE, description="Of AdamW, with --loss."
    )
    lr_schedule: Annotated[Literal["constant", "cosine", "linear"], Shown(group=OPTIMIZER)] = Field(
        default="constant", description="Of the learning rate, over each stage."
    )
    lr_warmup_steps: Annotated[int | None, Shown(group=OPTIMIZER, rare=True)] = Field(
        default=None, ge=0, description="Steps over which it rises; default: 20 where it decays, else none."
    )

    @model_validator(mode="after")
    def _parts_are_equal(self) -> Self:
        unit = self.grad_accum_steps * self.timesteps_per_sample
        if self.batch_size % unit:
            raise ValueError(
                f"batch-size is {self.batch_size}, expected a multiple of grad-accum-steps x timesteps-per-sample = "
                f"{self.grad_accum_steps} x {self.timesteps_per_sample}: the parts of a batch are equal; "
                f"take {max(1, self.batch_size // unit) * unit}"
            )
        return self

    @model_validator(mode="after")
    def _order_can_share(self) -> Self:
        if self.data_order == "sequential" and self.timesteps_per_sample > 1:
            raise ValueError(
                f"timesteps-per-sample is {self.timesteps_per_sample} with data-order sequential, expected 1: it walks each "
                f"trajectory step by step, one of them in a batch; take order shuffled"
            )
        return self

    @model_validator(mode="after")
    def _options_are_of_the_loss(self) -> Self:
        for loss, kind in LOSSES.items():
            for name in () if loss == self.loss else kind.options:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name.replace('_', '-')} is {getattr(self, name)} with loss {self.loss}: it is an option of "
                        f"the {loss} loss alone; leave it out, or take loss {loss}"
                    )
        return self


class Stage(StageOptions):
    """What optimizer steps of a run that follow one another have in common; an entry of a recipe.

    steps: how many. budget_share: the part of `--time-budget` that goes to this stage; `steps` is then None until the time
    of a step was measured.
    checkpoint_every: as the run's, for this stage; None: the run's.
    caches: names of caches and how much of each is seen; None: all of the run, each trajectory as often as any other.
    weight: "trajectory": a trajectory of one with 10 is seen ten times as often as one of one with 1 (the paper
    repeats T2I-CompBench ten times in its mix); "rows": they are parts of the rows, however large the caches are.
    """

    name: str = Field(min_length=1)
    steps: int | None = Field(default=None, ge=1)
    budget_share: float | None = Field(default=None, gt=0, le=1)
    checkpoint_every: int | None = Field(default=None, ge=1)
    caches: dict[str, float] | None = Field(default=None, min_length=1)
    weight: Literal["trajectory", "rows"] = "trajectory"

    @model_validator(mode="after")
    def _is_of_some_length(self) -> Self:
        if self.steps is None and self.budget_share is None:
            raise ValueError(f"stage {self.name} has neither steps nor budget-share, expected one of them")
        return self

    @model_validator(mode="after")
    def _weights_are_positive(self) -> Self:
        for name, weight in (self.caches or {}).items():
            if weight <= 0:
                raise ValueError(f"cache {name} has the weight {weight:g}, expected more than 0; leave it out")
        return self

    @property
    def length(self) -> int:
        """Its optimizer steps; of a stage whose budget was shared out."""
        assert self.steps is not None
        return self.steps

    @property
    def replays(self) -> bool:
        """Whether its steps go through the backbone."""
        return LOSSES[self.loss].replays

    @property
    def needs_embeddings(self) -> bool:
        """Whether its steps compare with the teacher's embeddings."""
        return not self.replays or self.embedding_loss_weight > 0

    def share_of(self, name: str, trajectories: int) -> Fraction:
        """Rows of a cache, in proportion to those of other caches of the stage."""
        weight = Fraction((self.caches or {}).get(name, 1.0))
        return weight * trajectories if self.weight == "trajectory" else weight
