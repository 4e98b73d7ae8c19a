"""Scores by prompt and by category, from the values of single images."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from secondcast.evaluation.image_metrics.metric import Picture, Scored
from secondcast.evaluation.intervals import bootstrap, wilson
from secondcast.storage_schemas.schema.prompts import prompt_id


def by_prompt(score: Scored, pictures: Sequence[Picture]) -> Scored:
    """The score with prompts as units: several images of a prompt are averaged first, and prompts resampled.

    Images of one prompt are correlated, and an interval over images would be too narrow. Scores without values by
    image, averages over categories, and scores with one image per prompt come back as they are.
    """
    if not score.values or score.parts or len(prompt_means(score.values, pictures)) == len(score.values):
        return score
    return _over(score, score.values, pictures)


def by_category(score: Scored, pictures: Sequence[Picture]) -> dict[str, Scored]:
    """The score of the images of each category, with prompts as units; empty for a score without values by image.

    pictures: those that were scored. A category of which no image has a value is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for picture in pictures:
        if picture.name in score.values:
            for category in picture.categories:
                found.setdefault(category, {})[picture.name] = score.values[picture.name]
    whole = replace(score, parts=(), missing={})
    return {category: _over(whole, values, pictures) for category, values in found.items()}


def prompt_means(values: Mapping[str, float], pictures: Sequence[Picture]) -> list[float]:
    """The mean value of each prompt. values: by Picture.name; an image without a prompt is a unit of its own."""
    groups: dict[str, list[float]] = {}
    for picture in pictures:
        if picture.name in values:
            unit = picture.name if picture.prompt is None else prompt_id(picture.prompt)
            groups.setdefault(unit, []).append(values[picture.name])
    return [float(np.mean(group)) for group in groups.values()]


def _over(score: Scored, values: Mapping[str, float], pictures: Sequence[Picture]) -> Scored:
    means = prompt_means(values, pictures)
    mean = float(np.mean(means))
    if score.interval == "wilson" and len(means) == len(values):
        low, high = wilson(mean, len(means))
        return replace(score, mean=mean, count=len(values), low=low, high=high, values=values)
    interval = bootstrap(means)
    low_high = interval or (None, None)
    return replace(
        score, mean=mean, count=len(values), low=low_high[0], high=low_high[1],
        interval="none" if interval is None else "bootstrap", values=values,
    )  # fmt: skip
