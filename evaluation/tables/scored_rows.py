"""Caches scored rows of a table: a file per text encoder, keyed by everything that its scores depend on."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from secondcast.evaluation.pocket_scores import Score
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import digest
from secondcast.storage_schemas.schema.json_files import Record


class ScoredRun(Record):
    """Scores of one text encoder, with the settings they depend on.

    scores: mean, count, low and high of each dimension. values: values by caption; not in files of earlier versions.
    """

    asked: dict[str, str]
    parameters: int
    scores: dict[str, tuple[float, int, float, float]]
    values: dict[str, tuple[float, ...]] | None = None

    @classmethod
    def of(cls, asked: dict[str, str], parameters: int, scores: Mapping[str, Score]) -> Self:
        """Store the result of score_images."""
        return cls(
            asked=asked,
            parameters=parameters,
            scores={name: (found.mean, found.count, found.low, found.high) for name, found in scores.items()},
            values={name: found.values for name, found in scores.items() if found.values is not None},
        )

    def by_dimension(self) -> dict[str, Score]:
        """The result in the form of score_images."""
        values = self.values or {}
        return {
            name: Score(mean=mean, count=count, low=low, high=high, values=values.get(name))
            for name, (mean, count, low, high) in self.scores.items()
        }


def computed_by(device: str) -> dict[str, str]:
    """The part of the key on this program, torch and the device, which affect values.

    device: a torch device name, or "auto".
    """
    import torch

    from secondcast.models.device import usable_device

    found = usable_device(device)
    name = torch.cuda.get_device_name(found) if found.type == "cuda" else found.type
    packages = {package: installed(package) for package in ("secondcast", "torch", "diffusers", "torchao")}
    return {"device": name, **packages}


def installed(package: str) -> str:
    """The version of a package; "none" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def kept(folder: Path | None, asked: dict[str, str]) -> ScoredRun | None:
    """Load earlier scores for the same key; None if there are none, or the file is damaged."""
    if folder is None:
        return None
    try:
        found = ScoredRun.model_validate_json(_file(folder, asked).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return found if found.asked == asked else None


def keep(folder: Path | None, run: ScoredRun) -> None:
    """Save scores for later calls with the same key."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        durable.replace(_file(folder, run.asked), (run.model_dump_json(indent=1) + "\n").encode())


def _file(folder: Path, asked: dict[str, str]) -> Path:
    return folder / f"{digest(asked)[:24]}.json"
