"""Computes all metrics on all folders; metrics that cannot run are reported and skipped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secondcast.evaluation.image_metrics.categories import by_category, by_prompt
from secondcast.evaluation.image_metrics.metric import Metric, Picture, Scored
from secondcast.storage_schemas.errors import ImagesError, SecondcastError
from secondcast.storage_schemas.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A metric that did not run; folder: None if it cannot run at all."""

    metric: str
    folder: str | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Scores by folder, in the requested order, and the skipped metrics.

    categories: by folder and source name the scores of the images with that name, of scores that have values by image.
    """

    pictures: Mapping[str, int]
    scored: Mapping[str, Sequence[Scored]]
    skipped: Sequence[Skipped]
    categories: Mapping[str, Mapping[str, Sequence[Scored]]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of all scores that any folder has, in the order of the metrics."""
        return list(dict.fromkeys(score.name for scores in self.scored.values() for score in scores))

    def json_value(self) -> dict[str, Any]:
        """As plain JSON types."""
        folders = [
            {
                "folder": name,
                "pictures": count,
                "scores": [score.json_value() for score in self.scored[name]],
                "categories": {
                    category: [_without_values(score) for score in scores]
                    for category, scores in self.categories.get(name, {}).items()
                },
            }
            for name, count in self.pictures.items()
        ]
        return {"folders": folders, "skipped": [vars(skipped) for skipped in self.skipped]}


def _without_values(score: Scored) -> dict[str, Any]:
    return {key: value for key, value in score.json_value().items() if key != "values"}


def score_folders(metrics: Iterable[Metric], folders: Mapping[str, Sequence[Picture]], progress: Progress) -> Report:
    """Score each folder with each metric; ImagesError for a broken image, which no metric can score.

    metrics: preferably a generator, so that only one network is in memory at a time.
    """
    scored: dict[str, list[Scored]] = {name: [] for name in folders}
    skipped = []
    for metric in metrics:
        possible = []
        for name, pictures in folders.items():
            try:
                metric.check(pictures)
                possible.append(name)
            except SecondcastError as error:
                skipped.append(Skipped(metric=metric.name, folder=name, why=str(error)))
        # Weights are downloaded only if they have something to score.
        if not possible:
            continue
        if (why := metric.available()) is not None:
            skipped.append(Skipped(metric=metric.name, folder=None, why=why))
            continue
        for name in possible:
            try:
                found = metric.score(folders[name], progress)
                scored[name] += [by_prompt(score, folders[name]) for score in found]
            except ImagesError:
                raise
            except SecondcastError as error:
                skipped.append(Skipped(metric=metric.name, folder=name, why=str(error)))
    return Report(
        pictures={name: len(pictures) for name, pictures in folders.items()},
        scored=scored,
        skipped=skipped,
        categories={name: _by_category(scored[name], pictures) for name, pictures in folders.items()},
    )


def _by_category(scores: Sequence[Scored], pictures: Sequence[Picture]) -> dict[str, list[Scored]]:
    found: dict[str, list[Scored]] = {name: [] for picture in pictures for name in picture.categories}
    for score in scores:
        for category, part in by_category(score, pictures).items():
            found[category].append(part)
    return {category: parts for category, parts in found.items() if parts}
