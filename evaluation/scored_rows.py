"""Rows of a table that were scored before stay: a file for each text encoder, by all that its scores depend on."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from evaluation.pocket_scores import Score
from storage_schemas import durable
from storage_schemas.digests import digest
from storage_schemas.manifest import Record


class ScoredRun(Record):
    """Scores of one text encoder, and what they are of."""

    asked: dict[str, str]
    parameters: int
    scores: dict[str, tuple[float, int, float, float]]

    def by_dimension(self) -> dict[str, Score]:
        """As score_images gives them."""
        return {
            name: Score(mean=mean, count=count, low=low, high=high)
            for name, (mean, count, low, high) in self.scores.items()
        }


def computed_by(device: str) -> dict[str, str]:
    """Part of what is asked: this program, torch and the device, by which values differ.

    device: a name that torch takes, or "auto".
    """
    import torch

    from models.device import usable_device

    found = usable_device(device)
    name = torch.cuda.get_device_name(found) if found.type == "cuda" else found.type
    packages = {package: _version(package) for package in ("understudy", "torch", "diffusers", "torchao")}
    return {"device": name, **packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def scored(folder: Path | None, asked: dict[str, str], score: Callable[[], ScoredRun]) -> ScoredRun:
    """What `score` gives; from the folder where it has been asked the same before, and into it."""
    if folder is None:
        return score()
    file = folder / f"{digest(asked)[:24]}.json"
    if file.is_file():
        try:
            found = ScoredRun.model_validate_json(file.read_bytes())
        except ValidationError:
            # Torn, or of another version: scored again.
            found = None
        if found is not None and found.asked == asked:
            return found
    made = score()
    folder.mkdir(parents=True, exist_ok=True)
    durable.replace(file, (made.model_dump_json(indent=1) + "\n").encode())
    return made
