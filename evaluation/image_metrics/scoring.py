"""Computes all metrics on all folders; metrics that cannot run are reported and skipped."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    """Scores by folder, in the requested order, and the skipped metrics."""

    pictures: Mapping[str, int]
    scored: Mapping[str, Sequence[Scored]]
    skipped: Sequence[Skipped]

    @property
    def names(self) -> list[str]:
        """Names of all scores that any folder has, in the order of the metrics."""
        return list(dict.fromkeys(score.name for scores in self.scored.values() for score in scores))

    def json_value(self) -> dict[str, Any]:
        """As plain JSON types."""
        folders = [
            {"folder": name, "pictures": count, "scores": [score.json_value() for score in self.scored[name]]}
            for name, count in self.pictures.items()
        ]
        return {"folders": folders, "skipped": [vars(skipped) for skipped in self.skipped]}


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
                scored[name] += metric.score(folders[name], progress)
            except ImagesError:
                raise
            except SecondcastError as error:
                skipped.append(Skipped(metric=metric.name, folder=name, why=str(error)))
    return Report(pictures={name: len(pictures) for name, pictures in folders.items()}, scored=scored, skipped=skipped)
