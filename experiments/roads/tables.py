"""Markdown of what `experiments.pocket_roads` found."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.roads.arms import BATCH_SIZE, VISION_TFLOP, Road
from experiments.training.tables import print_table, score_cell, short, spread
from secondcast.pocket.scorer import DIMENSIONS

Results = Sequence[dict[str, Any]]
# Held-out vision losses; a student that reaches the last one, with a mean score within .02 of the teacher's, has
# reached the teacher. Chosen before anything was measured.
THRESHOLDS = (0.1, 0.05, 0.02)
SCORE_MARGIN = 0.02
STEPS = (20, 40, 80, 160, 320, 640)
# In vision steps of FLUX.
BUDGETS = (0.25, 0.5, 1, 2, 20, 80)
VISION_STEP_TFLOP = BATCH_SIZE * VISION_TFLOP


def print_tables(references: Mapping[str, dict[str, Any]], results: Results) -> None:
    lines = [[name, f"{found['vision_loss']:.3g}", short(found["mean"])] for name, found in references.items()]
    print_table("References", ("text encoder", "vision loss", "mean score"), lines)
    for table, title in (("roads", "Roads"), ("late", "After the context loss")):
        own = [result for result in results if result["road"]["table"] == table]
        rows = _by_road(own)
        heads = [*map(str, STEPS), "mean score, last"]
        _print(f"{title}: vision loss at equal steps", heads, rows, _at_steps)
        heads = [*(f"{budget:g}" for budget in BUDGETS)]
        _print(f"{title}: vision loss at equal FLOPs, in vision steps of FLUX", heads, rows, _at_budgets)
    rows = _by_road([result for result in results if result["road"]["table"] == "roads"])
    heads = [*(f"to {level:g}" for level in THRESHOLDS), "prompts", "reaches the teacher"]
    _print(
        "Roads: vision steps of FLUX to a vision loss",
        heads,
        rows,
        lambda road, found: _reached(road, found, references),
    )
    sizes = [result for result in results if result["road"]["table"] == "sizes"]
    lines = [_size_row(road.initial, found) for road, found in _by_road(sizes).items()]
    lines += [_size_row(name, [found]) for name, found in references.items() if name == "teacher"]
    columns = ("student", "parameters", *DIMENSIONS, "mean", "vision loss, half and all of the steps")
    print_table("Sizes", columns, lines)


def _by_road(results: Results) -> dict[Road, list[dict[str, Any]]]:
    rows: dict[Road, list[dict[str, Any]]] = {}
    for result in results:
        rows.setdefault(Road(**result["road"]), []).append(result)
    return dict(sorted(rows.items(), key=lambda row: (row[0].loss, -row[0].prompts, row[0].initial)))


def _print(
    title: str,
    heads: Sequence[str],
    rows: Mapping[Road, Results],
    cells: Callable[[Road, Results], list[str]],
) -> None:
    lines = [[_title(road), str(road.prompts), str(len(found)), *cells(road, found)] for road, found in rows.items()]
    print_table(title, ("road", "prompts", "seeds", *heads), lines)


def _title(road: Road) -> str:
    return f"{road.initial}, {road.loss}{' with context' * road.mixed}, lr {road.learning_rate:g}"


def _curves(found: Results) -> list[dict[int, float]]:
    return [{point["steps"]: point["vision_loss"] for point in result["curve"]} for result in found]


def _at_steps(road: Road, found: Results) -> list[str]:
    cells = [
        spread([curve[number] for curve in _curves(found) if number in curve], "{:.3g}".format) for number in STEPS
    ]
    return [*cells, spread([result["mean"] for result in found], short)]


def _at_budgets(road: Road, found: Results) -> list[str]:
    cells = []
    for budget in BUDGETS:
        within = [n for n in road.measured() if road.training_tflop(n) <= budget * VISION_STEP_TFLOP]
        cells.append(spread([curve[within[-1]] for curve in _curves(found)], "{:.3g}".format) if within else "")
    return cells


def _reached(road: Road, found: Results, references: Mapping[str, dict[str, Any]]) -> list[str]:
    start = references["teacher-initial" if road.initial == "teacher" else "untrained"]["vision_loss"]
    needed = [0.0 if start <= level else _needed(road, found, level) for level in THRESHOLDS]
    scored = sum(result["mean"] for result in found) / len(found) >= references["teacher"]["mean"] - SCORE_MARGIN
    reached = "yes" if scored and math.isfinite(needed[-1]) else "loss only" if math.isfinite(needed[-1]) else "no"
    cells = [f"{value:.2g}" if math.isfinite(value) else "" for value in needed]
    return [*cells, f"{road.data_tflop() / VISION_STEP_TFLOP:.0f}", reached]


def _needed(road: Road, found: Results, level: float) -> float:
    """Vision steps of FLUX to the first measured checkpoint whose mean loss of the seeds is at most `level`."""
    for number in road.measured():
        losses = [curve[number] for curve in _curves(found)]
        if sum(losses) / len(losses) <= level:
            return road.training_tflop(number) / VISION_STEP_TFLOP
    return math.inf


def _size_row(name: str, found: Results) -> list[str]:
    losses = [f"{curve[n]:.3g}" for result in found for curve in _curves([result]) for n in sorted(curve)[-2:]] if (
        "curve" in found[0]
    ) else []  # fmt: skip
    scores = [score_cell(dimension, found) for dimension in DIMENSIONS]
    parameters = f"{found[0]['parameters']:,}" if "parameters" in found[0] else ""
    return [name, parameters, *scores, spread([result["mean"] for result in found], short), ", ".join(losses)]
