"""The arms of `python -m experiments.pocket_training`: what each trains, for how many steps, and what that takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# Divides by 1, 4 and 20: with --timesteps-per-sample a batch keeps its rows.
BATCH_SIZE = 40
SHARES = (4, 20)
WARMUP_RATE = 3e-3
RANDOM_START_RATES = (1e-3, 3e-3)
WARM_START_RATES = (3e-4, 1e-3)
# Part of the steps, or of the seconds, that is warm-up.
WARMUPS = {"short": 0.25, "long": 0.75}
CHEAP = ("embedding", "context")
# What calibration measures: the key of an arm's steps after its warm-up.
STEP_KINDS = (*CHEAP, "vision", "vision-sequential", *(f"vision-{share}" for share in SHARES))
BUDGETS = ("steps", "time")


def training_flags(
    student: str,
    loss: str,
    steps: int,
    learning_rate: float,
    seed: int,
    warmup: str | None = None,
    pretrain_steps: int = 0,
    warmup_rate: float | None = None,
) -> dict[str, Any]:
    """What every student of these experiments is trained with, by the names of TrainFlags."""
    flags: dict[str, Any] = {
        "student": student,
        "loss": loss,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": BATCH_SIZE,
        "lr_schedule": "cosine",
        "dropout": 0.0,
        "position_bias_lr_scale": 20.0,
        "checkpoint_every": 1_000_000,
        "seed": seed,
    }
    if warmup:
        flags |= {"pretrain_loss": warmup, "pretrain_steps": pretrain_steps, "pretrain_lr": warmup_rate}
    return flags


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Optimizer steps of every arm at equal steps, seconds of training of every arm at equal time.

    step_seconds: one optimizer step of each of STEP_KINDS, alone on one core.
    """

    steps: int
    seconds: float
    step_seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train. `budget` is "steps" or "time"; within it, arms of one `family` differ in what is tuned."""

    budget: str
    family: str
    loss: str
    steps: int
    learning_rate: float
    warmup: str | None = None
    pretrain_steps: int = 0
    order: str = "shuffled"
    share: int = 1

    @property
    def name(self) -> str:
        """A folder's name: budget, family, warm-up, learning rate."""
        return "-".join(filter(None, (self.budget, self.family, self.warmup, f"{self.learning_rate:g}")))

    @property
    def kind(self) -> str:
        """Of STEP_KINDS, that of the steps after the warm-up."""
        tail = "sequential" if self.order == "sequential" else str(self.share) if self.share > 1 else None
        return f"{self.loss}-{tail}" if tail else self.loss

    def seconds(self, step_seconds: Mapping[str, float]) -> float:
        """Seconds of training by calibration."""
        before = self.pretrain_steps * step_seconds[self.warmup] if self.warmup else 0.0
        return before + self.steps * step_seconds[self.kind]

    def flags(self, student: str, seed: int) -> dict[str, Any]:
        """What `secondcast train` is given, by the names of TrainFlags."""
        flags = training_flags(
            student, self.loss, self.steps, self.learning_rate, seed, self.warmup, self.pretrain_steps, WARMUP_RATE
        )
        return flags | {"data_order": self.order} | ({"timesteps_per_sample": self.share} if self.share > 1 else {})


def main_arms(budget: Budget) -> list[Arm]:
    """Naive, context and vision from a random start; vision after short and long warm-ups of both kinds."""
    arms = []
    for kind in BUDGETS:
        for family, loss in (("naive", "embedding"), ("context", "context"), ("vision", "vision")):
            arms += _tuned(budget, kind, family, loss=loss, rates=RANDOM_START_RATES)
        for length in WARMUPS:
            for warmup in CHEAP:
                arms += _tuned(budget, kind, length, warmup=warmup, part=WARMUPS[length])
    # The other half of the pair from a common warm start. One rate more than its rival: it gets every chance.
    rates = (*WARM_START_RATES, WARMUP_RATE)
    part = WARMUPS["long"]
    arms += _tuned(budget, "steps", "continued", loss="embedding", warmup="embedding", part=part, rates=rates)
    return arms


def replay_arms(budget: Budget, warmups: Mapping[str, str]) -> list[Arm]:
    """Order and steps per trajectory, after the short warm-up that did best at each budget; their rivals are there."""
    arms = []
    for kind in BUDGETS:
        common: dict[str, Any] = {"warmup": warmups[kind], "part": WARMUPS["short"]}
        arms += _tuned(budget, kind, "sequential", order="sequential", **common)
        for share in SHARES:
            arms += _tuned(budget, kind, f"share{share}", share=share, **common)
    return arms


def _tuned(
    budget: Budget,
    kind: str,
    family: str,
    *,
    loss: str = "vision",
    warmup: str | None = None,
    part: float = 0.0,
    rates: Sequence[float] = WARM_START_RATES,
    **how: Any,
) -> list[Arm]:
    arm = Arm(budget=kind, family=family, loss=loss, steps=1, learning_rate=1.0, warmup=warmup, **how)
    split = _split_steps if kind == "steps" else _split_seconds
    pretrain_steps, steps = split(budget, arm, part)
    lengths = {"pretrain_steps": pretrain_steps, "steps": steps}
    return [replace(arm, **lengths, learning_rate=rate) for rate in rates]


def _split_steps(budget: Budget, arm: Arm, part: float) -> tuple[int, int]:
    pretrain_steps = round(part * budget.steps)
    return pretrain_steps, budget.steps - pretrain_steps


def _split_seconds(budget: Budget, arm: Arm, part: float) -> tuple[int, int]:
    each = budget.step_seconds[arm.kind]
    steps = max(1, round((1 - part) * budget.seconds / each))
    if arm.warmup is None:
        return 0, steps
    # The warm-up's steps are the shorter ones: they take up what rounding left.
    left = budget.seconds - steps * each
    return max(1, round(left / budget.step_seconds[arm.warmup])), steps


def best(arms: Sequence[Arm], means: Mapping[str, float], **wanted: str) -> Arm:
    """Of the arms that match, the one with the highest mean score."""
    found = [arm for arm in arms if all(getattr(arm, key) == value for key, value in wanted.items())]
    return max(found, key=lambda arm: means[arm.name])


def best_warmups(arms: Sequence[Arm], means: Mapping[str, float]) -> dict[str, str]:
    """By budget, the kind of warm-up before the best short arm."""
    return {kind: best(arms, means, budget=kind, family="short").warmup or "" for kind in BUDGETS}


def finalists(arms: Sequence[Arm], means: Mapping[str, float]) -> list[Arm]:
    """The best arm of each family at each budget, and the best rival of the continued naive arm."""
    chosen = [
        best(arms, means, budget=kind, family=family)
        for kind in BUDGETS
        for family in dict.fromkeys(arm.family for arm in arms if arm.budget == kind)
    ]
    pair = best(arms, means, budget="steps", family="long", warmup="embedding")
    return chosen + [pair] * (pair not in chosen)
