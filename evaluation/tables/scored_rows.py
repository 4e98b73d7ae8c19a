"""Rows of a table that were scored before stay: a file for each text encoder, by all that its scores depend on."""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from secondcast.evaluation.pocket_scores import Score
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import digest
from secondcast.storage_schemas.schema.manifest import Record


class ScoredRun(Record):
    """Scores of one text encoder, and what they are of.

    scores: mean, count, low and high of each dimension. values: of its captions; earlier versions did not keep them.
    """

    asked: dict[str, str]
    parameters: int
    scores: dict[str, tuple[float, int, float, float]]
    values: dict[str, tuple[float, ...]] | None = None

    @classmethod
    def of(cls, asked: dict[str, str], parameters: int, scores: Mapping[str, Score]) -> Self:
        """What score_images gave."""
        return cls(
            asked=asked,
            parameters=parameters,
            scores={name: (found.mean, found.count, found.low, found.high) for name, found in scores.items()},
            values={name: found.values for name, found in scores.items() if found.values is not None},
        )

    def by_dimension(self) -> dict[str, Score]:
        """As score_images gives them."""
        values = self.values or {}
        return {
            name: Score(mean=mean, count=count, low=low, high=high, values=values.get(name))
            for name, (mean, count, low, high) in self.scores.items()
        }


def computed_by(device: str) -> dict[str, str]:
    """Part of what is asked: this program, torch and the device, by which values differ.

    device: a name that torch takes, or "auto".
    """
    import torch

    from secondcast.models.device import usable_device

    found = usable_device(device)
    name = torch.cuda.get_device_name(found) if found.type == "cuda" else found.type
    packages = {package: _version(package) for package in ("secondcast", "torch", "diffusers", "torchao")}
    return {"device": name, **packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def kept(folder: Path | None, asked: dict[str, str]) -> ScoredRun | None:
    """What was scored before when the same was asked; None where nothing is, or a file that is damaged."""
    if folder is None:
        return None
    try:
        found = ScoredRun.model_validate_json(_file(folder, asked).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return found if found.asked == asked else None


def keep(folder: Path | None, run: ScoredRun) -> None:
    """Write what was scored, for whoever asks the same again."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        durable.replace(_file(folder, run.asked), (run.model_dump_json(indent=1) + "\n").encode())


def _file(folder: Path, asked: dict[str, str]) -> Path:
    return folder / f"{digest(asked)[:24]}.json"
