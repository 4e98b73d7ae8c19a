"""What `python -m experiments.pocket_experiment` trains: sizes, data of one kind, stages, another tokenizer."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as remembered
from pathlib import Path
from typing import Any

from experiments.training.arms import BATCH_SIZE, WARMUPS, training_flags

SIZES = ("tiny", "small", "base")
LOSSES = ("embedding", "context", "vision")
KINDS = ("scene", "composition", "sign")
ALL = "all"
# `context` and `embedding` learn at these. Wide: a method whose best rate lies at an edge has not been tuned.
RATES = {"tiny": (3e-3, 1e-2, 3e-2), "small": (3e-3, 1e-2, 3e-2), "base": (1e-3, 3e-3, 1e-2)}
# After a warm-up, likewise.
VISION_RATE = 3e-4
# From a random start.
OWN_RATE = 1e-3
# Loss of the warm-up (None: none), and of what follows. The fourth is what `secondcast train` does by default.
METHODS: Mapping[str, tuple[str | None, str]] = {
    "naive": (None, "embedding"),
    "context": (None, "context"),
    "naive-vision": ("embedding", "vision"),
    "vision": ("context", "vision"),
}
ORDERS = ("staged", "single")
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "pocket.toml"
# Of the seconds of both orders, what is warm-up.
STAGES_WARMUP = 0.5
BERT = "bert"

StepSeconds = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One student trained one way. Trials of one `row` of a table differ in what is tuned.

    size: of SIZES, or BERT. caches: names of caches. steps: of the last loss, after pretrain_steps of the loss
    `warmup`.
    order: of ORDERS where it is trained by a recipe with stages.
    """

    table: str
    row: str
    size: str
    caches: tuple[str, ...]
    loss: str
    steps: int
    learning_rate: float
    warmup: str | None = None
    pretrain_steps: int = 0
    warmup_rate: float | None = None
    order: str | None = None

    @property
    def name(self) -> str:
        """A folder's name."""
        rate = f"-{self.rate:g}" if self.table == "scaling" else ""
        return f"{self.table}-{self.row}{rate}"

    @property
    def rate(self) -> float:
        """What is tuned: that of the warm-up where there is one."""
        return self.warmup_rate or self.learning_rate

    def seconds(self, step_seconds: StepSeconds) -> float:
        """Seconds of training by calibration."""
        each = step_seconds["small" if self.size == BERT else self.size]
        before = self.pretrain_steps * each[self.warmup] if self.warmup else 0.0
        return before + self.steps * each[self.loss]

    def flags(self, seed: int, bert: Path) -> dict[str, Any]:
        """What `secondcast train` is given without a recipe, by the names of TrainFlags."""
        student = str(bert) if self.size == BERT else f"pocket-{self.size}"
        return training_flags(
            student, self.loss, self.steps, self.learning_rate, seed, self.warmup, self.pretrain_steps, self.warmup_rate
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All trials of a budget: seconds of training each, and of the student with a tokenizer of its own.

    step_seconds: by size and loss.
    """

    seconds: float
    own_seconds: float
    step_seconds: StepSeconds

    def scaling(self) -> list[Trial]:
        """Each size by each method, at equal time, with the rates that are to be tuned."""
        return [self._scaled(size, method, rate) for size in SIZES for method in METHODS for rate in RATES[size]]

    def _scaled(self, size: str, method: str, rate: float) -> Trial:
        warmup, loss = METHODS[method]
        common: dict[str, Any] = {
            "table": "scaling", "row": f"{size}-{method}", "size": size, "caches": (ALL,), "loss": loss,
        }  # fmt: skip
        if warmup is None:
            steps = max(1, round(self.seconds / self.step_seconds[size][loss]))
            return Trial(**common, steps=steps, learning_rate=rate)
        pretrain_steps, steps = self._split(size, WARMUPS["long"], warmup)
        before = {"warmup": warmup, "pretrain_steps": pretrain_steps, "warmup_rate": rate}
        return Trial(**common, **before, steps=steps, learning_rate=VISION_RATE)

    def _split(self, size: str, part: float, warmup: str) -> tuple[int, int]:
        each = self.step_seconds[size]
        steps = max(1, round((1 - part) * self.seconds / each["vision"]))
        return max(1, round((self.seconds - steps * each["vision"]) / each[warmup])), steps

    def equal_steps(self, chosen: Sequence[Trial]) -> list[Trial]:
        """The smaller sizes, as they were chosen, with the steps of the largest."""
        largest = {_method(trial): trial for trial in chosen if trial.size == SIZES[-1]}
        return [
            replace(
                trial, table="equal", steps=largest[_method(trial)].steps,
                pretrain_steps=largest[_method(trial)].pretrain_steps,
            )
            for trial in chosen
            if trial.size != SIZES[-1]
        ]  # fmt: skip

    def ablation(self, rival: Trial) -> list[Trial]:
        """One kind of data each, trained as the rival was on all of them."""
        return [replace(rival, table="ablation", row=kind, caches=(kind,)) for kind in KINDS]

    def stages(self, rival: Trial) -> list[Trial]:
        """The paper's three stages against one, after the same warm-up, equal steps, the three caches of one kind.

        The warm-up's rate is the rival's.
        """
        pretrain_steps, steps = self._split("small", STAGES_WARMUP, "context")
        return [
            Trial(
                table="stages",
                row=order,
                size="small",
                caches=KINDS,
                loss="vision",
                steps=steps,
                learning_rate=_recipe()["stage"][-1]["learning-rate"],
                warmup="context",
                pretrain_steps=pretrain_steps,
                warmup_rate=rival.rate,
                order=order,
            )
            for order in ORDERS
        ]

    def bert(self) -> Trial:
        """Another tokenizer has no embedding to compare token by token: vision from a random start."""
        steps = max(1, round(self.own_seconds / self.step_seconds["small"]["vision"]))
        return Trial(
            table="tokenizer", row=BERT, size=BERT, caches=(ALL,), loss="vision", steps=steps, learning_rate=OWN_RATE
        )


def _method(trial: Trial) -> str:
    return trial.row.removeprefix(f"{trial.size}-")


def small_vision(chosen: Iterable[Trial]) -> Trial:
    """What the questions are asked of, and what the ablation and the stages are compared with."""
    return next(trial for trial in chosen if trial.row == "small-vision")


def best_rows(trials: Sequence[Trial], means: Mapping[str, float]) -> list[Trial]:
    """Of the trials of each row the one with the highest mean score, in the order of the rows."""
    rows = dict.fromkeys(trial.row for trial in trials)
    return [max((t for t in trials if t.row == row), key=lambda t: means.get(t.name, 0.0)) for row in rows]


@remembered
def _recipe() -> dict[str, Any]:
    run: dict[str, Any] = tomllib.loads(RECIPE.read_text())["train"]
    return run


def recipe_text(trial: Trial) -> str:
    """recipes/pocket.toml with the steps of a trial; `single` has its last stage alone, as long as all three."""
    recipe = _recipe()
    warmup, *paper = recipe["stage"]
    lengths = _shared([stage["steps"] for stage in paper], trial.steps)
    stages = [stage | {"steps": steps} for stage, steps in zip(paper, lengths, strict=True)]
    # The rate rises over the same part of a shorter stage.
    for before, after in zip(paper, stages, strict=True):
        if "lr-warmup-steps" in before:
            after["lr-warmup-steps"] = max(1, round(before["lr-warmup-steps"] * after["steps"] / before["steps"]))
    if trial.order == "single":
        stages = [paper[-1] | {"steps": trial.steps}]
    stages = [warmup | {"steps": trial.pretrain_steps, "learning-rate": trial.warmup_rate}, *stages]
    run = {key: value for key, value in recipe.items() if key not in ("stage", "caches")} | {
        "checkpoint-every": 1_000_000
    }
    text = _lines(run)
    for stage in stages:
        # The recipe's caches are the plural of their kinds.
        own = stage | {"batch-size": BATCH_SIZE} | _singular(stage.get("caches"))
        text += ["", "[[stage]]", *_lines(own)]
    return "\n".join(text) + "\n"


def _singular(caches: Iterable[str] | Mapping[str, float] | None) -> dict[str, Any]:
    if caches is None:
        return {}
    if isinstance(caches, Mapping):
        return {"caches": {name.removesuffix("s"): weight for name, weight in caches.items()}}
    return {"caches": [name.removesuffix("s") for name in caches]}


def _shared(parts: Sequence[int], total: int) -> list[int]:
    steps = [max(1, round(total * part / sum(parts))) for part in parts[:-1]]
    return [*steps, max(1, total - sum(steps))]


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in values.items()]


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(one)}' for key, one in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)
