"""The exact scores of the pocket world as a metric of image folders."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

import numpy as np

from secondcast.evaluation.image_metrics.metric import MetricName, Needs, Picture, Scored, with_prompts
from secondcast.evaluation.intervals import wilson
from secondcast.pocket.scorer import DIMENSIONS, score
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.progress import Progress


class PocketScores:
    """A score for each dimension that a caption of the folder has, with a Wilson interval over captions."""

    name: MetricName = "pocket"
    needs = Needs(packages=(), weights="none", how="")

    def check(self, pictures: Sequence[Picture]) -> None:
        """See Metric."""
        with_prompts(self.name, pictures)

    def available(self) -> str | None:
        """See Metric."""
        return None

    def score(self, pictures: Sequence[Picture], progress: Progress) -> list[Scored]:
        """See Metric."""
        values: dict[str, dict[str, float]] = {name: {} for name in DIMENSIONS}
        for picture, caption in with_prompts(self.name, pictures):
            try:
                found = score(np.asarray(picture.pixels()), caption)
            except ValueError as error:
                raise PromptsError(f"pocket: {picture.file}: {error}") from error
            for name, value in found.items():
                values[name][picture.name] = value
        return [_scored(name, found) for name, found in values.items() if found]


def _scored(name: str, values: Mapping[str, float]) -> Scored:
    mean = float(np.mean(list(values.values())))
    low, high = wilson(mean, len(values))
    return Scored(
        name=name, mean=mean, count=len(values), low=low, high=high, interval="wilson",
        model="secondcast.pocket.scorer", revision=version("secondcast"), values=values,
    )  # fmt: skip
