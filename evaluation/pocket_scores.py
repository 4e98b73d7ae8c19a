"""Exact scores on the pocket world for teacher, trained and untrained student on the same captions and noise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from secondcast.evaluation.intervals import wilson
from secondcast.pocket.scorer import DIMENSIONS, score
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.schema.fields import Array

if TYPE_CHECKING:
    from secondcast.evaluation.sampling import Embed, Generator


@dataclass(frozen=True, kw_only=True)
class Score:
    """Mean of one dimension over the captions it applies to, with its 95 % Wilson interval.

    For characters the interval counts captions, not letters, which is conservative.
    values: values of these captions, in order; None in files of earlier versions, which only have the mean.
    """

    mean: float
    count: int
    low: float
    high: float
    values: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Images of one text encoder, and their scores by dimension."""

    name: str
    images_NHWC: Array
    scores: Mapping[str, Score]


def score_encoders(
    studio: "Generator",
    encoders: "Mapping[str, Embed]",
    captions: Sequence[str],
    *,
    batch_size: int,
    progress: Progress,
) -> list[Scored]:
    """Score every text encoder; PromptsError for a caption that is not of the pocket world."""
    results = []
    for name, embed in encoders.items():
        with progress.bar(name, total=len(captions), done=0, unit="images") as bar:
            images_NHWC = studio.images(embed, captions, batch_size=batch_size, bar=bar)
        results.append(Scored(name=name, images_NHWC=images_NHWC, scores=score_images(images_NHWC, captions)))
    return results


def score_images(images_NHWC: Array, captions: Sequence[str]) -> dict[str, Score]:
    """Scores by dimension, in the scorer's order, without dimensions that no caption has."""
    values: dict[str, list[float]] = {name: [] for name in DIMENSIONS}
    for image, caption in zip(images_NHWC, captions, strict=True):
        try:
            found = score(image, caption)
        except ValueError as error:
            raise PromptsError(f"{caption!r} cannot be scored: {error}") from error
        for name, value in found.items():
            values[name].append(value)
    return {name: _score(column) for name, column in values.items() if column}


def _score(column: list[float]) -> Score:
    mean = float(np.mean(column))
    low, high = wilson(mean, len(column))
    return Score(mean=mean, count=len(column), low=low, high=high, values=tuple(column))


def table_rows(results: Sequence[Scored]) -> list[dict[str, Any]]:
    """One row per dimension for printing or JSON."""
    return [
        {
            "dimension": name,
            "captions": first.count,
            **{
                result.name: {key: round(getattr(result.scores[name], key), 4) for key in ("mean", "low", "high")}
                for result in results
            },
        }
        for name, first in results[0].scores.items()
    ]
