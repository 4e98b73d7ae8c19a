"""Markdown of what `experiments.pocket_training` found."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from experiments.training.arms import BUDGETS, Arm, Budget
from secondcast.evaluation.intervals import wilson
from secondcast.pocket.scorer import DIMENSIONS

Results = Sequence[dict[str, Any]]
TITLES = {
    "naive": "naive",
    "context": "context",
    "vision": "vision, random start",
    "short": "short warm-up, vision",
    "long": "long warm-up, vision",
    "continued": "long warm-up, naive",
    "sequential": "short warm-up, vision, sequential",
    "share4": "short warm-up, vision, 4 steps per trajectory",
    "share20": "short warm-up, vision, 20 steps per trajectory",
}
# What each question is answered by; the short arm is shuffled, with one step per trajectory.
QUESTIONS = {
    "Losses and warm-ups": ("naive", "context", "vision", "short", "long", "continued"),
    "Order": ("short", "sequential"),
    "Steps per trajectory": ("short", "share4", "share20"),
}


def print_tables(budget: Budget, arms: Sequence[Arm], chosen: Sequence[Arm], results: Results) -> None:
    # Where the finals are not through, the seeds that all finalists have.
    seeds = set.intersection(*({result["seed"] for result in _of(arm, results)} for arm in chosen))
    results = [result for result in results if result["seed"] in seeds]
    print(f"Seconds a step, one core: {', '.join(f'{k} {v:.4f}' for k, v in budget.step_seconds.items())}.\n")
    references = [[result] for result in results if "arm" not in result]
    lines = [_row(found[0]["name"], "", found) for found in references]
    print_table("References", ("text encoder", "", *_COLUMNS), lines)
    for question, families in QUESTIONS.items():
        for kind in BUDGETS:
            length = f"{budget.steps} steps" if kind == "steps" else f"{budget.seconds:g} s"
            own = [arm for arm in chosen if arm.budget == kind and arm.family in families]
            lines = [_row(_title(arm), _steps(arm), _of(arm, results)) for arm in own]
            print_table(f"{question}, equal {kind}: {length}, {len(seeds)} seeds", ("arm", "steps", *_COLUMNS), lines)
    screened = sorted(arms, key=lambda arm: (arm.budget, arm.family))
    lines = [_screened_row(arm, [r for r in _of(arm, results) if r["seed"] == 0]) for arm in screened]
    print_table("Screening, one seed", ("budget", "arm", "steps", *_SUMMARY), lines)


_SCORES = tuple(DIMENSIONS)
_SUMMARY = ("mean", "vision loss", "embedding error", "context error", "s, training")
_COLUMNS = (*_SCORES, *_SUMMARY)


def _title(arm: Arm) -> str:
    start = f" ({arm.warmup})" if arm.warmup else ""
    return f"{TITLES[arm.family]}{start}, lr {arm.learning_rate:g}"


def _steps(arm: Arm) -> str:
    return f"{arm.pretrain_steps} + {arm.steps}" if arm.warmup else str(arm.steps)


def _of(arm: Arm, results: Results) -> list[dict[str, Any]]:
    return [result for result in results if result["name"] == arm.name]


def _row(title: str, steps: str, found: Results) -> list[str]:
    return [title, steps, *(score_cell(name, found) for name in _SCORES), *_summary(found)]


def _screened_row(arm: Arm, found: Results) -> list[str]:
    return [arm.budget, _title(arm), _steps(arm), *_summary(found)]


def score_cell(name: str, found: Results) -> str:
    scores = [result["scores"][name] for result in found if name in result["scores"]]
    if not scores:
        return ""
    mean = statistics.fmean(score["mean"] for score in scores)
    # The captions are the same ones for every seed: more seeds are not more captions.
    low, high = wilson(mean, max(score["count"] for score in scores))
    return f"{short(mean)} ({short(low)}-{short(high)})"


def _summary(found: Results) -> list[str]:
    return [
        spread([result["mean"] for result in found], short),
        *(
            spread([result[key] for result in found], "{:.3g}".format)
            for key in ("vision_loss", "embedding_error", "context_error")
        ),
        spread([result["training_seconds"] for result in found if "arm" in result], "{:.0f}".format),
    ]


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Mean, and the lowest and highest of the seeds."""
    if not values:
        return ""
    middle = form(statistics.fmean(values))
    return middle if len(values) == 1 else f"{middle} [{form(min(values))}, {form(max(values))}]"


def short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def print_table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print(f"### {title}\n")
    for line in (heads, ["---"] * len(heads), *lines):
        print(f"| {' | '.join(line)} |")
    print()
