"""One picture of what `benchmarks.pocket_sensitivity` found.

Shaded prompts, eigenvalues of the metric, and every trained student's surrogate against its vision loss.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pocket_judge import KIND_NAMES
from benchmarks.pocket_metrics import FULL, Places
from inspection.reading import token_pieces
from pocket.world import require_scene
from storage_schemas import sensitivity
from storage_schemas.folders import LocalFolder
from storage_schemas.reader import Cache

PICTURE = "sensitivity.png"
WORD_START = "▁"
_SIZE = (11, 4.6)
_PER_KIND, _TEXT_LIMIT = 2, 76
# Weights from white to full colour.
_LEAST, _MOST = 0.3, 30.0
# Of the panel's width.
_CHARACTER, _GAP = 0.0061, 0.0065


def draw(folder: Path, runs: Sequence[Mapping[str, Any]]) -> Path:
    """DIR/sensitivity.png; it needs matplotlib."""
    # Not pyplot: it keeps figures, and looks for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = sensitivity.read(LocalFolder(Places(folder=folder).cache(FULL)))
    assert found is not None
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    _prompts(above.subplots(), Cache.open(str(folder / "cache")), found)
    left, right = below.subplots(1, 2)
    _spectrum(left, found)
    _students(right, runs)
    file = folder / PICTURE
    figure.savefig(file, dpi=110)
    return file


def shown_prompts(cache: Cache, found: sensitivity.Sensitivity) -> list[int]:
    """Of each kind the first sampled prompts that are short enough for a line."""
    kinds: dict[str, list[int]] = {name: [] for name in KIND_NAMES.values()}
    for number, prompt in enumerate(cache.prompts):
        of_kind = kinds[KIND_NAMES[type(require_scene(prompt.text))]]
        if found.weights_of(prompt.id) is not None and len(prompt.text) <= _TEXT_LIMIT:
            of_kind.append(number)
    return [number for of_kind in kinds.values() for number in of_kind[:_PER_KIND]]


def _prompts(panel: Any, cache: Cache, found: sensitivity.Sensitivity) -> None:
    import matplotlib

    colours = matplotlib.colormaps["YlOrRd"]
    panel.set(xlim=(0, 1), ylim=(0, 1), xticks=[], yticks=[], title="what is read: token weights (logarithmic shades)")
    panel.set_frame_on(False)
    numbers = shown_prompts(cache, found)
    for row, number in enumerate(numbers):
        prompt = cache.prompts[number]
        weights_T = found.weights_of(prompt.id)
        assert weights_T is not None
        at, height = 0.0, 1 - (row + 0.5) / len(numbers)
        for piece, weight in zip(token_pieces(cache, prompt.token_ids), weights_T, strict=False):
            text = f" {piece.lstrip(WORD_START)} " if piece.startswith(WORD_START) else piece
            strength = np.log(weight / _LEAST) / np.log(_MOST / _LEAST)
            shade = colours(0.75 * float(np.clip(strength, 0, 1)))
            box = {"facecolor": shade, "edgecolor": "none", "pad": 1.5}
            panel.text(at, height, text, family="monospace", fontsize=8, va="center", bbox=box)
            at += _CHARACTER * len(text) + _GAP


def _spectrum(panel: Any, found: sensitivity.Sensitivity) -> None:
    values_D = np.linalg.eigvalsh(found.metric_DD.astype(np.float64))[::-1]
    shares_D = values_D.clip(min=0).cumsum() / values_D.clip(min=0).sum()
    rank = found.record.effective_rank
    panel.plot(np.arange(1, len(shares_D) + 1), shares_D, color="C0")
    panel.axvline(rank, color="C3", linestyle="--", linewidth=1, label=f"effective rank {rank:.1f}")
    panel.set(
        xscale="log", ylim=(0, 1.03), xlabel=f"directions of {len(shares_D)}", ylabel="share of the metric",
        title="in how many directions",
    )  # fmt: skip
    panel.legend(loc="lower right")


def _students(panel: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    for colour, loss in enumerate(sorted({str(run["loss"]) for run in runs})):
        own = [run for run in runs if run["loss"] == loss]
        panel.scatter(
            [run["vision_loss"] for run in own], [run["surrogate"] for run in own], s=18, alpha=0.7,
            color=f"C{colour}", label={"embedding": "naive"}.get(loss, loss), linewidths=0,
        )  # fmt: skip
    panel.set(
        xscale="log", yscale="log", xlabel="vision loss, held-out", ylabel="surrogate",
        title=f"{len(runs)} students, by the loss they were trained with last",
    )  # fmt: skip
    panel.legend(loc="upper left", fontsize=8)
