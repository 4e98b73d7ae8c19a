"""The report of a training run: losses, validations and samples, read from the files of its folder."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from secondcast.inspection.report.curves import run_curves
from secondcast.inspection.report.strips import data_uri
from secondcast.models.student.folder import best_checkpoint, checkpoints, config_of, step_of
from secondcast.storage_schemas.errors import StudentError, reason
from secondcast.storage_schemas.progress import counted

REPORT_FILE = "report.html"
PROMPTS_KEY = "Description"
"""Keyword of the text in a sample's PNG that has its prompts, one a line."""
_SAMPLES_FOLDER = "samples"
_NAME = re.compile(r"step-(\d{6,})\.png")
# A page is rewritten at every checkpoint: what it costs must not grow with the run.
_MOST_SHEETS, _WIDEST_PX = 6, 640


def sample_file(run: Path, step: int) -> Path:
    """The sheet of samples after `step` optimizer steps."""
    return run / _SAMPLES_FOLDER / f"step-{step:06d}.png"


def run_data(run: Path) -> dict[str, Any]:
    """Contents of the page as plain JSON types."""
    config, sheets = config_of(run), dict(sorted(_sheets(run)))
    shown = _spread(list(sheets))
    samples, notes = [], []
    for step in shown:
        try:
            samples.append(_sample(step, sheets[step]))
        # A report never stops a training.
        except (OSError, SyntaxError, ValueError) as error:
            notes.append(f"{sheets[step].name} cannot be read ({reason(error)})")
    if len(shown) < len(sheets):
        notes.append(f"samples of {len(shown)} of {len(sheets)} steps; all are in {run / _SAMPLES_FOLDER}")
    return {
        "title": run.resolve().name,
        "created_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "created_by": f"secondcast {version('secondcast')}",
        "facts": [list(fact) for fact in _facts(run, config)],
        "curves": run_curves(run),
        "samples": samples,
        "notes": notes,
    }


def _sheets(run: Path) -> Iterator[tuple[int, Path]]:
    for file in (run / _SAMPLES_FOLDER).glob("*.png"):
        if (named := _NAME.fullmatch(file.name)) is not None:
            yield int(named[1]), file


def _spread(steps: list[int]) -> list[int]:
    """The first and the last of these steps, and some between."""
    places = np.linspace(0, len(steps) - 1, min(_MOST_SHEETS, len(steps)))
    return [steps[round(place)] for place in places.tolist()]


def _sample(step: int, file: Path) -> dict[str, Any]:
    with Image.open(file) as sheet:
        prompts = sheet.info.get(PROMPTS_KEY, "").split("\n")
        picture = sheet.convert("RGB")
    picture.thumbnail((_WIDEST_PX, picture.height), Image.Resampling.LANCZOS)
    return {"step": step, "prompts": prompts, "sheet": data_uri(picture, frame_side=picture.width)}


def _stage_text(stage: dict[str, Any]) -> str:
    steps = stage.get("steps")
    return f"{stage['name']}: {stage['loss']} loss" + ("" if steps is None else f", {counted(steps, 'step')}")


def _facts(run: Path, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    settings = config.get("settings", {})
    stages = settings.get("stages", [])
    if saved := checkpoints(run):
        total = sum(stage.get("steps") or 0 for stage in stages)
        yield "steps", f"{step_of(saved[-1]):,} of {total:,}"
    try:
        best = best_checkpoint(run)
    except StudentError:
        best = None
    if best is not None:
        yield "lowest validation loss", f"{best[1]:.4g}, at step {step_of(best[0]):,}"
    yield "student", str(settings.get("student"))
    yield "stages", "; ".join(map(_stage_text, stages))
    yield "caches", ", ".join(str(cache.get("location")) for cache in config.get("caches", {}).values())
    yield "transformer", str(config.get("backbone"))
