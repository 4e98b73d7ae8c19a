"""Students of a report: loaded and checked, or read from evaluations, and converted for the page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secondcast.evaluation.replaying import CacheStudent
from secondcast.evaluation.results import Evaluation, StepErrors
from secondcast.inspection.report.curves import run_curves
from secondcast.inspection.report.table import rounded
from secondcast.models.memory.meta_run import parameter_count
from secondcast.models.student.folder import config_of, is_quantized, student_folder
from secondcast.storage_schemas.errors import SettingsError, StudentError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.reader import Cache

NO_PICTURES: dict[str, Any] = {"rows": [], "teacher": [], "untrained": []}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A student by its name in the report; `network` if it is to be evaluated, `record` if it was evaluated before."""

    name: str
    place: Path
    network: CacheStudent | None = None
    record: Evaluation | None = None


@dataclass(frozen=True, kw_only=True)
class Students:
    """Students in the page's form, notes, and the mean error of each table row that has one.

    pictures: the teacher's and an untrained student's images of the trajectories that students were sampled on.
    """

    facts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hardness: dict[int, float] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=lambda: dict(NO_PICTURES))


def open_students(
    cache: Cache, students: Sequence[Path], evaluations: Sequence[Path], device: torch.device
) -> list[Asked]:
    """All requested students, checked against the cache: StudentError, SettingsError."""
    opened = [Asked(name="", place=place, network=CacheStudent.open(place, cache, device)) for place in students]
    digest = cache.manifest.digests()["sampling"]
    for file in evaluations:
        record = Evaluation.read(file)
        if record.sampling_digest != digest:
            raise SettingsError(
                f"{file} was evaluated on a cache with sampling {record.sampling_digest[:12]} ({record.cache}), "
                f"{cache.folder} has {digest[:12]}: it was evaluated on other trajectories; evaluate the student "
                f"on this cache with --student"
            )
        opened.append(Asked(name="", place=Path(record.student), record=record))
    names = [asked.place.resolve().name for asked in opened]
    return [
        Asked(
            name=name if names.count(name) == 1 else _distinct(name, names[:number], str(asked.place)),
            place=asked.place,
            network=asked.network,
            record=asked.record,
        )
        for number, (name, asked) in enumerate(zip(names, opened, strict=True))
    ]


def _distinct(name: str, before: Sequence[str], place: str) -> str:
    return f"{place} ({before.count(name) + 1})" if name in before else place


def of_records(asked: Sequence[Asked], row_of: Mapping[str, int]) -> Students:
    """Previously evaluated students; SettingsError for one without any trajectory of this cache."""
    facts, notes = [], []
    for one in asked:
        record = one.record
        assert record is not None
        kept = [place for place, found in enumerate(record.trajectories) if found.key in row_of]
        if not kept:
            raise SettingsError(
                f"the evaluation of {record.student} has {counted(len(record.trajectories), 'trajectory')} of "
                f"{record.cache}, none of which is in this cache: evaluate the student on it with --student"
            )
        notes.append(f"{one.name}: an earlier evaluation on {counted(len(record.trajectories), 'held-out trajectory')}")
        if len(kept) < len(record.trajectories):
            notes.append(f"{one.name}: {len(record.trajectories) - len(kept):,} of them are not in this cache")
        rows = [row_of[record.trajectories[place].key] for place in kept]
        errors = _part(record.errors, kept)
        replay_error = None if record.replay_error is None else _part(record.replay_error, kept)
        facts.append(student_facts(one, rows, record.steps, errors, replay_error, _recorded_results(record, row_of)))
    return Students(facts=facts, notes=notes, hardness=hardness_of(facts))


def without_errors(asked: Sequence[Asked]) -> Students:
    """Facts of students that are not evaluated, from their folders."""
    return Students(facts=[student_facts(one, [], (), None, None, None) for one in asked])


def _part(errors: StepErrors, places: Sequence[int]) -> StepErrors:
    return StepErrors(
        error_fraction=tuple(errors.error_fraction[place] for place in places),
        mean_square=tuple(errors.mean_square[place] for place in places),
    )


def _recorded_results(record: Evaluation, row_of: Mapping[str, int]) -> dict[str, Any] | None:
    closed = record.closed_loop
    if closed is None or "student" not in closed.text_encoders:
        return None
    keys = [record.trajectories[place].key for place in closed.trajectories]
    kept = [number for number, key in enumerate(keys) if key in row_of]
    result = closed.text_encoders["student"]
    rows = [row_of.get(key, -1) for key in keys]
    facts = closed_facts(rows, result.latent_fraction, result.psnr_db, result.ssim, [])
    # An evaluation does not store images.
    return {name: [column[number] for number in kept] if column else [] for name, column in facts.items()}


def closed_facts(
    rows: list[int],
    latent_fraction: Sequence[float],
    psnr_db: Sequence[float | None],
    ssim: Sequence[float],
    pictures: list[str],
) -> dict[str, Any]:
    """Closed loop of a student, by trajectory; a column that was not measured is empty."""
    return {
        "rows": rows,
        "latent_fraction": [rounded(value) for value in latent_fraction],
        "psnr_db": [rounded(value) for value in psnr_db],
        "ssim": [rounded(value) for value in ssim],
        "final": pictures,
    }


def student_facts(
    one: Asked,
    rows: list[int],
    steps: Sequence[int],
    errors: StepErrors | None,
    replay_error: StepErrors | None,
    closed: dict[str, Any] | None,
) -> dict[str, Any]:
    """A student in the page's form; errors: None if it has none."""
    return {
        "name": one.name,
        "parameters": _parameters(one),
        "rows": rows if errors is not None else [],
        "steps": list(steps) if errors is not None else [],
        "errors": [] if errors is None else _numbers(errors),
        "replay_error": None if replay_error is None or errors is None else _numbers(replay_error),
        "closed": closed,
        "curves": run_curves(one.place),
    }


def _numbers(errors: StepErrors) -> list[list[float | None]]:
    return [[rounded(value) for value in row] for row in errors.error_fraction]


def _parameters(one: Asked) -> int | None:
    """Parameters of the network, or of the weight files if an evaluated student's folder still exists; else None."""
    if one.network is not None:
        return parameter_count(one.network.network)
    try:
        folder = student_folder(one.place)
        if is_quantized(config_of(folder)):
            # Its files have codes and scales, whose numbers are not those of the weights.
            return None
        files = sorted(folder.glob("*.safetensors"))
        return sum(_stored_values(file) for file in files) or None
    except (StudentError, OSError, ValueError, LookupError, TypeError):
        return None


def _stored_values(file: Path) -> int:
    with file.open("rb") as data:
        header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def hardness_of(facts: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Mean error by table row, over steps and students."""
    found: dict[int, list[float]] = {}
    for one in facts:
        for row, errors in zip(one["rows"], one["errors"], strict=True):
            found.setdefault(row, []).append(float(np.mean([value for value in errors if value is not None] or [0.0])))
    return {row: float(np.mean(means)) for row, means in found.items()}
