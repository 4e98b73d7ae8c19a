"""A stage of a run: optimizer steps with one loss, data order and learning rate, on some of the caches."""

from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from secondcast.storage_schemas.schema.flags import Flag, Flags
from secondcast.trainer.loss_kinds import LOSSES, LOSSES_HELP, Loss

LARGEST, LARGEST_FACTOR, LARGEST_RATE = 1e12, 1e6, 1e30
"""Upper bounds of loss weights, learning-rate factors and learning rates that stay finite in float32."""
StepWeights = Literal["uniform", "sigma", "interval"]
OrderKind = Literal["shuffled", "sequential"]
OBJECTIVE, DATA, OPTIMIZER = "Loss", "Data", "Optimizer"
"""Headings of options in help texts."""


class StageOptions(Flags):
    """Training options of a stage.

    huber_delta: difference at which `loss` turns from quadratic to linear; None: quadratic everywhere.
    timestep_weighting: factors on the errors of the vision loss at step k, mean 1: see
    losses.vision.timestep_weighting.
    embedding_loss_weight: weight of the embedding loss that is added to the vision loss.
    context_loss_weight: weight of the context loss, on as many prompts of text caches, that is added to the vision
        loss.
    depth_blocks: number of the transformer's first blocks that the depth loss runs. Each further block costs as much as
        the first one; the first one already mixes text into the image tokens.
    batch_size: rows of one optimizer step.
    grad_accum_steps: number of equal parts of the batch, computed one after the other.
    timesteps_per_sample: rows of the vision loss that share one forward pass of the student.
    lr_warmup_steps: steps over which the learning rate rises; None: 20 with a decaying lr_schedule, else 0.
    """

    loss: Annotated[Loss, Flag(group=OBJECTIVE)] = Field(
        default="vision",
        description=LOSSES_HELP,
    )
    huber_delta: Annotated[float | None, Flag(group=OBJECTIVE, rare=True)] = Field(
        default=None,
        gt=0,
        le=LARGEST,
        description="Threshold of the Huber loss: --loss is linear, not quadratic, for differences above this.",
    )
    timestep_weighting: Annotated[StepWeights, Flag(group=OBJECTIVE, rare=True)] = Field(
        default="uniform",
        description="Weights of timesteps in the vision loss: uniform as in the paper, sigma, or interval (in sigma).",
    )
    embedding_loss_weight: Annotated[float, Flag(group=OBJECTIVE, rare=True)] = Field(
        default=0.0, ge=0, le=LARGEST, description="Weight of the embedding loss that is added to the vision loss."
    )
    context_loss_weight: Annotated[float, Flag(group=OBJECTIVE, rare=True)] = Field(
        default=0.0,
        ge=0,
        le=LARGEST,
        description="Weight of the context loss that is added to the vision loss, on as many prompts of text caches.",
    )
    depth_blocks: Annotated[int, Flag(group=OBJECTIVE, rare=True)] = Field(
        default=1, ge=1, description="Number of the transformer's first blocks that the depth loss runs."
    )
    batch_size: Annotated[int, Flag(group=DATA)] = Field(
        default=32, ge=1, description="Number of samples per optimizer step."
    )
    grad_accum_steps: Annotated[int, Flag(group=DATA)] = Field(
        default=1,
        ge=1,
        description="Number of gradient accumulation steps: --batch-size is split into this many micro-batches.",
    )
    data_order: Annotated[OrderKind, Flag(group=DATA)] = Field(
        default="shuffled", description="Order of the training data: shuffled, or sequential as in the paper."
    )
    timesteps_per_sample: Annotated[int, Flag(group=DATA, rare=True)] = Field(
        default=1,
        ge=1,
        description="Number of timesteps per trajectory in a batch, which share one forward pass of the student.",
    )
    learning_rate: Annotated[float, Flag(group=OPTIMIZER)] = Field(
        default=1e-4, gt=0, le=LARGEST_RATE, description="Learning rate of AdamW for --loss."
    )
    lr_schedule: Annotated[Literal["constant", "cosine", "linear"], Flag(group=OPTIMIZER)] = Field(
        default="constant", description="Learning-rate schedule of each stage."
    )
    lr_warmup_steps: Annotated[int | None, Flag(group=OPTIMIZER, rare=True)] = Field(
        default=None,
        ge=0,
        description="Number of learning-rate warm-up steps. Default: 20 with a decaying --lr-schedule, else 0.",
    )

    @model_validator(mode="after")
    def _parts_are_equal(self) -> Self:
        unit = self.grad_accum_steps * self.timesteps_per_sample
        if self.batch_size % unit:
            raise ValueError(
                f"batch-size is {self.batch_size}, expected a multiple of grad-accum-steps x timesteps-per-sample = "
                f"{self.grad_accum_steps} x {self.timesteps_per_sample}: the parts of a batch are equal; "
                f"use {max(1, self.batch_size // unit) * unit}"
            )
        return self

    @model_validator(mode="after")
    def _order_can_share(self) -> Self:
        if self.data_order == "sequential" and self.timesteps_per_sample > 1:
            raise ValueError(
                f"timesteps-per-sample is {self.timesteps_per_sample} with data-order sequential, expected 1: that "
                "order has one timestep of each trajectory in a batch; use data-order shuffled"
            )
        return self

    @model_validator(mode="after")
    def _options_are_of_the_loss(self) -> Self:
        for loss, kind in LOSSES.items():
            for name in () if loss == self.loss else kind.options:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name.replace('_', '-')} is {getattr(self, name)} with loss {self.loss}: it only applies to "
                        f"the {loss} loss; remove it, or use loss {loss}"
                    )
        return self


class Stage(StageOptions):
    """Consecutive optimizer steps with the same options; an entry of a recipe.

    steps: number of steps.
    budget_share: fraction of `--time-budget` for this stage; `steps` is then None until the time of a step is measured.
    checkpoint_every: overrides the run's value for this stage; None: the run's.
    caches: weights of caches by name; None: all caches of the run, with equal weight per trajectory.
    weight: meaning of the weights. "trajectory": a trajectory of a cache with weight 10 is seen ten times as often as
        one of a cache with weight 1 (the paper repeats T2I-CompBench ten times in its mix). "rows": proportions of
        rows, independent of the sizes of the caches.
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
                raise ValueError(f"cache {name} has the weight {weight:g}, expected more than 0; remove it")
        return self

    @property
    def length(self) -> int:
        """Number of optimizer steps, known once a budget_share is converted to steps."""
        assert self.steps is not None
        return self.steps

    @property
    def replays(self) -> bool:
        """Whether the stage trains through blocks of the backbone, on recorded latents."""
        return LOSSES[self.loss].replays

    @property
    def predicts(self) -> bool:
        """Whether the stage trains through the whole backbone."""
        return LOSSES[self.loss].predicts

    @property
    def blocks(self) -> int | None:
        """Number of the backbone's first blocks that the stage runs; None: all."""
        return None if self.predicts else self.depth_blocks

    @property
    def needs_embeddings(self) -> bool:
        """Whether the loss compares with the teacher's embeddings."""
        return not self.predicts or self.embedding_loss_weight > 0

    @property
    def parts_per_process(self) -> int:
        """Number of forward passes of the student in an optimizer step: for its batch, and for prompts beside it."""
        return self.grad_accum_steps * (2 if self.context_loss_weight else 1)

    def trains_on(self, name: str, *, is_text: bool) -> bool:
        """Whether the rows of a batch of the loss may come from a cache; replay needs trajectories."""
        return (self.caches is None or name in self.caches) and not (self.replays and is_text)

    def share_of(self, name: str, trajectories: int) -> Fraction:
        """Share of a cache in the rows of the stage, relative to its other caches."""
        weight = Fraction((self.caches or {}).get(name, 1.0))
        return weight * trajectories if self.weight == "trajectory" else weight
