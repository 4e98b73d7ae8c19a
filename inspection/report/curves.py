"""Training curves of a run from its metrics.jsonl, which has a JSON object per line with `step` and logged values."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secondcast.inspection.report.table import rounded

METRICS_FILE = "metrics.jsonl"
REPLAYED = "validation_loss_by_step"
# More points than a page has pixels.
_MOST_POINTS = 400

Point = tuple[int, float]


def run_curves(run: Path) -> list[dict[str, Any]]:
    """Loss, validation loss and learning rate by optimizer step; empty for anything but a run folder.

    Each kind of loss has its own curve, named by the kind. Long curves are reduced to means over equal intervals.
    """
    curves: dict[str, list[Point]] = {}
    kinds: dict[str, None] = {}
    kind = ""
    for entry in _entries(run / METRICS_FILE):
        if isinstance(entry.get("kind"), str):
            kind = entry["kind"]
            kinds[kind] = None
        for key, name in (
            ("loss", f"{kind} loss"),
            # The same measure for all stages: by replay if the run has the transformer.
            ("validation_loss", "validation vision loss" if REPLAYED in entry else "validation loss"),
            ("learning_rate", "learning rate"),
        ):
            value = entry.get(key)
            if isinstance(value, int | float) and np.isfinite(value):
                curves.setdefault(name, []).append((entry["step"], float(value)))
    if len(kinds) <= 1:
        curves = {name.removeprefix(f"{kind} ").strip(): points for name, points in curves.items()}
    return [_curve(name, curves[name]) for name in sorted(curves, key=_order)]


def _order(name: str) -> tuple[int, str]:
    return (2 if name == "learning rate" else 1 if name.startswith("validation") else 0), name


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                # The last line of a killed run may be incomplete.
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield entry


def _curve(name: str, points: Sequence[Point]) -> dict[str, Any]:
    parts = np.array_split(np.array(points, dtype=np.float64), min(len(points), _MOST_POINTS))
    return {
        "name": name,
        "x": [round(float(part[-1, 0])) for part in parts],
        "y": [rounded(float(part[:, 1].mean())) for part in parts],
    }
