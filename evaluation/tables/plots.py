"""Plots of results as PNG files, by matplotlib (the extra `plots`), without a screen."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from secondcast.evaluation.tables.table import Row, millions
from secondcast.storage_schemas.errors import MissingExtraError
from secondcast.storage_schemas.schema.fields import Array

_WIDTH, _HEIGHT = 3.2, 2.6
_COLUMNS = 4
# Overlapping rows differ in dashes, markers and transparency.
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_ALPHA = 0.7
# Offset between points of equal size on the logarithmic axis.
_APART = 1.06


def check_plotting() -> None:
    """Raise MissingExtraError without matplotlib or scikit-learn."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"plots need {error.name}, which is not installed: pip install 'secondcast[plots]'"
        ) from error


def plot_scaling(table_rows: Sequence[Row], *, baselines: Sequence[str] = ()) -> bytes:
    """Score against parameters, a panel for each dimension; rows named in `baselines` are horizontal lines.

    The paper's scaling figure: students as points with 95 % intervals, the teacher above them.
    """
    dimensions = list(table_rows[0].cells)
    rows = -(-len(dimensions) // _COLUMNS)
    figure, panels = _figure(rows, min(_COLUMNS, len(dimensions)))
    sizes = [row.parameters for row in table_rows if row.name not in baselines]
    places, ticks = beside(sizes), sorted(set(sizes))
    for panel, dimension in zip(panels, dimensions, strict=False):
        place = iter(places)
        for number, row in enumerate(table_rows):
            cell, colour = row.cells[dimension], f"C{number}"
            if row.name in baselines:
                # The first line is thicker, so that both of two overlapping lines are visible.
                dashes, width = _DASHES[(number + 1) % len(_DASHES)], 2.5 if number == 0 else 1
                panel.axhline(cell.mean, color=colour, linestyle=dashes, linewidth=width, alpha=_ALPHA, label=row.name)
                continue
            below, above = max(0.0, cell.mean - cell.low), max(0.0, cell.high - cell.mean)
            panel.errorbar(
                next(place), cell.mean, yerr=[[below], [above]], fmt=_MARKS[number % len(_MARKS)], color=colour,
                alpha=_ALPHA, capsize=3, label=row.name,
            )  # fmt: skip
        if all(row.cells[dimension].low >= 0 and row.cells[dimension].high <= 1 for row in table_rows):
            panel.set_ylim(-0.05, 1.05)
        panel.set(title=dimension, xscale="log", xlim=(ticks[0] / 1.5, ticks[-1] * 1.5))
        panel.minorticks_off()
        panel.set_xticks(ticks, labels=[millions(size) for size in ticks], fontsize=7)
    for panel in panels[len(dimensions) :]:
        panel.set_axis_off()
    panels[0].legend(fontsize=6)
    figure.supxlabel("parameters")
    figure.supylabel("score")
    return _png(figure)


def beside(parameters: list[int]) -> list[float]:
    """Positions on the logarithmic axis; points of equal size are placed side by side."""
    seen: dict[int, int] = {}
    places = []
    for size in parameters:
        number = seen[size] = seen.get(size, -1) + 1
        places.append(size * _APART ** (number - (parameters.count(size) - 1) / 2))
    return places


def plot_step_errors(curves: Mapping[str, Sequence[float]], *, sigmas: Sequence[float]) -> bytes:
    """Relative error of the prediction at each step over sigma, a curve for each name; noise is at the left."""
    figure, (panel,) = _figure(1, 1, scale=1.6)
    for number, (name, errors) in enumerate(curves.items()):
        panel.plot(
            sigmas[: len(errors)], errors, marker=_MARKS[number % len(_MARKS)], markersize=4, alpha=_ALPHA,
            linestyle=_DASHES[number % len(_DASHES)], label=name,
        )  # fmt: skip
    panel.set(xlabel="sigma", ylabel="error / norm of the velocity", yscale="log")
    panel.invert_xaxis()
    panel.legend(fontsize=7)
    return _png(figure)


def plot_embeddings(embeddings: Mapping[str, Array], *, seed: int = 0) -> bytes:
    """t-SNE (van der Maaten and Hinton 2008) of embeddings [N, D] of the same N texts by several encoders.

    All share one map: the points of a student that learned the teacher's embedding coincide with the teacher's.
    """
    from sklearn.manifold import TSNE

    names = list(embeddings)
    points = np.concatenate([embeddings[name] for name in names])
    perplexity = min(30.0, max(1.0, (len(points) - 1) / 4))
    map_N2 = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
    figure, (panel,) = _figure(1, 1, scale=1.8)
    first = 0
    for number, name in enumerate(names):
        own = map_N2[first : first + len(embeddings[name])]
        mark = _MARKS[number % len(_MARKS)]
        # Students that learned the teacher's embedding would otherwise hide each other.
        panel.scatter(own[:, 0], own[:, 1], s=14, marker=mark, alpha=_ALPHA / 2, linewidths=0, label=name)
        first += len(own)
    panel.set(xticks=[], yticks=[])
    panel.legend(fontsize=7)
    return _png(figure)


def _figure(rows: int, columns: int, *, scale: float = 1.0) -> tuple[Any, list[Any]]:
    # Not pyplot, which keeps figures alive and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(scale * _WIDTH * columns, scale * _HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    return figure, list(panels.flat)


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, dpi=150, format="png")
    return data.getvalue()
