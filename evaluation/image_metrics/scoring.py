"""All metrics over all folders: what cannot run is said and left out, the rest goes on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secondcast.evaluation.image_metrics.metric import Metric, Picture, Scored
from secondcast.storage_schemas.errors import ImagesError, SecondcastError
from secondcast.storage_schemas.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A metric that did not run; folder: None where it cannot run at all."""

    metric: str
    folder: str | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """Scores by folder, in the order asked for, and what was left out."""

    pictures: Mapping[str, int]
    scored: Mapping[str, Sequence[Scored]]
    skipped: Sequence[Skipped]

    @property
    def names(self) -> list[str]:
        """Names of all scores that some folder has, in the order of the metrics."""
        return list(dict.fromkeys(score.name for scores in self.scored.values() for score in scores))

    def json_value(self) -> dict[str, Any]:
        """As plain JSON types."""
        folders = [
            {"folder": name, "pictures": count, "scores": [score.json_value() for score in self.scored[name]]}
            for name, count in self.pictures.items()
        ]
        return {"folders": folders, "skipped": [vars(skipped) for skipped in self.skipped]}


def score_folders(metrics: Iterable[Metric], folders: Mapping[str, Sequence[Picture]], progress: Progress) -> Report:
    """Score each folder by each metric; ImagesError for a picture that is broken, since nothing could score it.

    metrics: best one that makes them as they come, so that one network is in memory at a time.
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
        # Weights are fetched for what they can score, and for nothing else.
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
