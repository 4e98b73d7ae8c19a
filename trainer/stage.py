"""A stage of a run: so many optimizer steps with one loss, one order and one learning rate, on some of the caches."""

from fractions import Fraction
from typing import Literal, Self

from pydantic import Field, model_validator

from secondcast.storage_schemas.schema.manifest import Flags

LARGEST, LARGEST_FACTOR, LARGEST_RATE = 1e12, 1e6, 1e30
"""Of weights in a loss, of what a learning rate is multiplied with, of learning rates: all are finite in float32."""
Loss = Literal["vision", "embedding", "context"]
OrderKind = Literal["shuffled", "following"]


class StageOptions(Flags):
    """How a stage trains.

    huber: where `loss` turns from a square into a line, in the units of what it compares; None: a square everywhere.
    step_weights: what the errors of the vision loss at step k are multiplied by, mean 1: see losses.step_weights.
    embedding_term: weight of the embedding loss beside the vision loss.
    batch_size: rows of one optimizer step; accumulate: equal parts of it that go through the networks one by one.
    steps_per_trajectory: rows of the vision loss that share one forward pass of the student.
    lr_warmup_steps: steps over which the learning rate rises; None: 20 where it decays, else none.
    """

    loss: Loss = "vision"
    huber: float | None = Field(default=None, gt=0, le=LARGEST)
    step_weights: Literal["uniform", "sigma", "interval"] = "uniform"
    embedding_term: float = Field(default=0.0, ge=0, le=LARGEST)
    batch_size: int = Field(default=32, ge=1)
    accumulate: int = Field(default=1, ge=1)
    order: OrderKind = "shuffled"
    steps_per_trajectory: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0, le=LARGEST_RATE)
    decay: Literal["constant", "cosine", "linear"] = "constant"
    lr_warmup_steps: int | None = Field(default=None, ge=0)

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


class Stage(StageOptions):
    """What optimizer steps of a run that follow one another have in common; an entry of a recipe.

    steps: how many. budget_share: the part of `--budget` that goes to this stage; `steps` is then None until the time
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
    def needs_embeddings(self) -> bool:
        """Whether its steps compare with the teacher's embeddings."""
        return self.loss != "vision" or self.embedding_term > 0

    def share_of(self, name: str, trajectories: int) -> Fraction:
        """Rows of a cache, in proportion to those of other caches of the stage."""
        weight = Fraction((self.caches or {}).get(name, 1.0))
        return weight * trajectories if self.weight == "trajectory" else weight
