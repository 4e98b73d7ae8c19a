"""The interface of image metrics: requirements, availability, and scores with confidence intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
from PIL import Image

from secondcast.evaluation.intervals import bootstrap
from secondcast.evaluation.pictures.rgb import in_rgb
from secondcast.storage_schemas.errors import ImagesError, PromptsError
from secondcast.storage_schemas.progress import Progress

MetricName = Literal["clip-score", "fid", "vqa", "text", "compbench", "pocket"]
Interval = Literal["bootstrap", "wilson", "none"]

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image to score. text: text to render; phrases: objects to show; None: not stated.

    name: path within the folder, the key of its values: files in different subfolders may have the same file name.
    phrases_by: what found the phrases. without_adjectives: the prompt without its adjectives.
    categories: source names of the prompt.
    """

    file: Path
    name: str
    prompt: str | None = None
    text: str | None = None
    phrases: tuple[str, ...] | None = None
    phrases_by: str | None = None
    without_adjectives: str | None = None
    categories: tuple[str, ...] = ()

    def pixels(self) -> Image.Image:
        """Load the image in 8-bit RGB, with transparency on white; ImagesError if it cannot be decoded."""
        try:
            with Image.open(self.file) as image:
                return in_rgb(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).split()).replace(str(self.file), "it")
            raise ImagesError(
                f"{self.file} cannot be read as an image ({reason}): generate it again, or remove it from the folder "
                f"and its index"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a metric needs beside the pictures, and how to get it, in one line."""

    packages: tuple[str, ...]
    weights: str
    how: str


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One number of a folder. values: by Picture.name, where single pictures have one.

    low, high: 95 %, by what `interval` names; None where there is none. model: name or folder of the network, or of a
    program; revision: commit on the hub, sha256 of the weights of a folder, or version. library: what computed it, with
    its version, where the number depends on that. phrases: what found the phrases of the prompts.
    parts: the categories whose means it averages; missing: the categories that it lacks, with the reason.
    """

    name: str
    mean: float
    count: int
    low: float | None
    high: float | None
    interval: Interval
    model: str
    revision: str
    values: Mapping[str, float] = field(default_factory=dict)
    library: str | None = None
    phrases: str | None = None
    parts: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def json_value(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {**vars(self), "values": dict(self.values), "missing": dict(self.missing)}


class Metric(Protocol):
    """A score of a folder of images."""

    name: MetricName
    needs: Needs

    def check(self, pictures: Sequence[Picture]) -> None:
        """Raise the errors of `score` that follow from prompts and counts alone, without loading weights."""
        ...

    def available(self) -> str | None:
        """Why it cannot run here, in one line with the fix; None if it can. May download weights."""
        ...

    def score(self, pictures: Sequence[Picture], progress: Progress) -> list[Scored]:
        """Score images: one score, or several from the same pass.

        Raises ImagesError for a broken image, another SecondcastError if these images cannot be scored.
        """
        ...


def mean_of(name: str, values: Mapping[str, float], *, model: str, revision: str) -> Scored:
    """Mean of the values of single images, with its bootstrap interval."""
    numbers = list(values.values())
    interval = bootstrap(numbers)
    low, high = interval or (None, None)
    return Scored(
        name=name,
        mean=float(np.mean(numbers)),
        count=len(numbers),
        low=low,
        high=high,
        interval="none" if interval is None else "bootstrap",
        model=model,
        revision=revision,
        values=values,
    )


def batches(items: Sequence[_Item], size: int) -> list[Sequence[_Item]]:
    """Split items into batches of `size`; the last may be smaller."""
    return [items[begin : begin + size] for begin in range(0, len(items), size)]


def with_prompts(metric: str, pictures: Sequence[Picture]) -> list[tuple[Picture, str]]:
    """Images with their prompts; PromptsError if they have none."""
    found = [(picture, picture.prompt) for picture in pictures if picture.prompt is not None]
    if not found:
        raise PromptsError(
            f"{metric} needs the prompts of the images, but {pictures[0].file.parent} has no index.jsonl: give them "
            f"with --prompts FILE"
        )
    return found
