"""Markdown of what `benchmarks.pocket_sensitivity` found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.pocket_metrics import FULL, agreement
from benchmarks.pocket_tables import print_table, score_cell, short, spread
from pocket.scorer import DIMENSIONS

if TYPE_CHECKING:
    from benchmarks.pocket_sensitivity import Trial

Results = Sequence[Mapping[str, Any]]
_ERRORS = ("vision_loss", "surrogate", "context_error", "embedding_error")
_COLUMNS = (*DIMENSIONS, "mean", *(name.replace("_", " ") for name in _ERRORS), "s, training")


def print_all(
    folder: Path, screened: "Sequence[Trial]", chosen: "Sequence[Trial]", runs: Results, measured: Results
) -> None:
    _measurements(folder, measured)
    lines = [[trial.row, f"{trial.learning_rate:g}", str(trial.steps), *_cells(_of(trial, runs))] for trial in screened]
    print_table("Short, small, one seed", ("loss", "rate", "steps", *_COLUMNS), lines)
    seeds = len(_of(chosen[0], runs))
    lines = [
        [trial.size, trial.row, f"{trial.learning_rate:g}", _steps(trial), *_cells(_of(trial, runs))]
        for trial in chosen
    ]
    print_table(f"Equal time, {seeds} seeds", ("size", "loss", "rate", "steps", *_COLUMNS), lines)
    _correlations(runs)


def _measurements(folder: Path, measured: Results) -> None:
    lines = []
    for one in measured:
        name = str(one["name"])
        cosine, weights = (1.0, 1.0) if name == FULL else agreement(folder, name)
        told = one["correlation"]
        lines.append(
            [
                name,
                f"{one['seconds']:.0f}",
                f"{one['effective_rank']:.1f}",
                f"{cosine:.3f}",
                "" if weights is None else f"{weights:.3f}",
                "" if told is None else f"{told:.2f}",
            ]
        )
    heads = (
        "measured", "s, one core", "effective rank", "cosine to full", "weights, correlation to full",
        "predicted weights, correlation",
    )  # fmt: skip
    print_table("Measurements", heads, lines)


def _of(trial: "Trial", runs: Results) -> list[Mapping[str, Any]]:
    return [result for result in runs if result["name"] == trial.name]


def _steps(trial: "Trial") -> str:
    return f"{trial.warmup_steps} + {trial.steps}" if trial.warmup else str(trial.steps)


def _cells(found: Results) -> list[str]:
    return [
        *(score_cell(name, found) for name in DIMENSIONS),
        spread([result["mean"] for result in found], short),
        *(spread([result[name] for result in found], "{:.3g}".format) for name in _ERRORS),
        spread([result["training_seconds"] for result in found], "{:.0f}".format),
    ]


def _correlations(runs: Results) -> None:
    lines = []
    for name in _ERRORS[1:]:
        every = rank_correlation([run["vision_loss"] for run in runs], [run[name] for run in runs])
        scores = rank_correlation([-run["mean"] for run in runs], [run[name] for run in runs])
        lines.append([name.replace("_", " "), f"{every:.2f}", f"{scores:.2f}"])
    heads = ("error of the embedding", "with the vision loss", "with the mean score (sign turned)")
    print_table(f"Rank correlation over {len(runs)} students", heads, lines)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, equal values in the order they come."""
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])
