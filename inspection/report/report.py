"""`inspect report`: a cache, and students on it, as plain JSON types for inspection/report/page.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from secondcast.inspection.images import shown_steps
from secondcast.inspection.report.evaluating import Evaluating
from secondcast.inspection.report.integrity import NOT_CHECKED, Readable, check_files, damaged_places
from secondcast.inspection.report.settings import ReportSettings
from secondcast.inspection.report.strips import StripMaker, check_sheet, chosen_rows, frame_px, strip_rows
from secondcast.inspection.report.students import (
    NO_PICTURES,
    Asked,
    Students,
    of_records,
    open_students,
    without_errors,
)
from secondcast.inspection.report.table import committed_columns, norm_columns, rounded
from secondcast.inspection.summary import summarise
from secondcast.inspection.summary_text import summary_lines
from secondcast.models.families.family import Role
from secondcast.models.teacher.folder import DECODE_PARTS, REPLAY_PARTS, TeacherFolder, check_recorded_transformer
from secondcast.models.teacher.image_decoder import load_recorded_decoder
from secondcast.storage_schemas.errors import DamagedCacheError, TeacherError
from secondcast.storage_schemas.io.folders import open_folder
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.storage_schemas.reader import Cache, read_manifest
from secondcast.storage_schemas.schema.manifest import Manifest, no_trajectories

Resolve = Callable[[str, tuple[Role, ...]], TeacherFolder]
"""Resolves a teacher by name, with the given components available."""


def report_data(
    location: str, settings: ReportSettings, *, resolve: Resolve, device: torch.device, progress: Progress
) -> dict[str, Any]:
    """Collect the contents of the page. Damaged data is skipped with a note; incompatible inputs are refused first.

    NotACacheError without a readable manifest; StudentError, TeacherError, SettingsError.
    """
    manifest = read_manifest(open_folder(location))
    if manifest.is_text:
        raise no_trajectories("inspect report", location)
    check_sheet(manifest.sampling, side=settings.frame_size, frames=settings.num_frames)
    try:
        # Checksums are compared once, by the verification of all files.
        cache = Cache.open(location, verify="off")
    except DamagedCacheError as error:
        return _unopened(location, manifest, settings, str(error), progress)
    return _Report.checked(cache, settings, resolve, device, progress).made(location)


@dataclass(frozen=True, kw_only=True)
class _Report:
    """A report with validated inputs; maker: None without a VAE, with the reason in `notes`."""

    cache: Cache
    settings: ReportSettings
    asked: Sequence[Asked]
    backbone: TeacherFolder | None
    maker: StripMaker | None
    device: torch.device
    notes: list[str]
    progress: Progress

    @classmethod
    def checked(
        cls, cache: Cache, settings: ReportSettings, resolve: Resolve, device: torch.device, progress: Progress
    ) -> "_Report":
        asked = open_students(cache, settings.students, settings.evaluations, device)
        evaluated = bool(settings.students and settings.num_trajectories)
        named = settings.backbone or settings.teacher or cache.manifest.source
        backbone = resolve(named, REPLAY_PARTS) if evaluated else None
        if backbone is not None:
            check_recorded_transformer(backbone, cache.manifest.teacher)
        notes: list[str] = []
        if not cache.finished:
            notes.append(
                f"the cache is being built: {len(cache):,} of its {cache.planned:,} trajectories are committed"
            )
        pictures = settings.num_strips != 0 or (evaluated and settings.closed_loop > 0)
        maker = _strip_maker(cache, settings, resolve, device, notes) if pictures and len(cache) else None
        return cls(
            cache=cache, settings=settings, asked=asked, backbone=backbone, maker=maker, device=device, notes=notes,
            progress=progress,
        )  # fmt: skip

    def made(self, location: str) -> dict[str, Any]:
        columns, notes = committed_columns(self.cache)
        row_of = {key: row for row, key in enumerate(columns["key"])}
        # First, because it refuses evaluations of other trajectories.
        before = of_records([one for one in self.asked if one.record is not None], row_of)
        integrity, damaged = (
            check_files(location, self.progress) if self.settings.verify_checksums else (NOT_CHECKED, frozenset())
        )
        readable = Readable(cache=self.cache, damaged=damaged)
        norms, more = norm_columns(readable, self.settings.max_norms, self.progress)
        students = self._students(readable, row_of, before)
        strips = self._strips(readable, students.hardness, more)
        return {
            **_head(location, self.cache.manifest, self.settings),
            "notes": [*self.notes, *notes, *more, *students.notes],
            "summary": self._summary(integrity),
            "integrity": integrity,
            "trajectories": {**columns, **norms, "damaged": damaged_places(self.cache, damaged, columns["index"])},
            "strips": {**_strips_head(self.cache.manifest, self.settings), "rows": strips},
            "students": students.facts,
            "pictures": students.pictures,
        }

    def _summary(self, integrity: dict[str, Any]) -> list[list[str]]:
        lines = dict(summary_lines(summarise(self.cache)))
        if self.settings.verify_checksums:
            # Replaces the summary's own entry, which does not compare checksums.
            lines["integrity"] = integrity["text"]
        return [list(line) for line in lines.items()]

    def _students(self, readable: Readable, row_of: dict[str, int], before: Students) -> Students:
        live = [one for one in self.asked if one.network is not None]
        if self.backbone is None:
            found = without_errors(live)
        else:
            evaluating = Evaluating(
                asked=live,
                readable=readable,
                teacher=self.backbone,
                scoring=self.settings.scoring(),
                device=self.device,
                maker=self.maker,
                progress=self.progress,
            )
            found = evaluating.run(row_of)
        return Students(
            facts=[*found.facts, *before.facts],
            notes=[*found.notes, *before.notes],
            hardness={**before.hardness, **found.hardness},
            pictures=found.pictures,
        )

    def _strips(self, readable: Readable, hardness: dict[int, float], notes: list[str]) -> list[dict[str, Any]]:
        if self.maker is None or self.settings.num_strips == 0:
            return []
        indices = self.cache.indices().tolist()
        chosen = chosen_rows(len(indices), self.settings.num_strips, hardness, self.settings.seed)
        made = strip_rows(readable, self.maker, chosen, indices, self.progress)
        hardest = sum(one["why"] == "hardest" for one in made)
        if self.settings.num_strips is not None and len(chosen) < len(indices):
            notes.append(
                f"film strips of {len(made):,} of {len(indices):,} trajectories: the {hardest:,} hardest and "
                f"{len(made) - hardest:,} at random (seed {self.settings.seed}); for all of them use `secondcast "
                f"inspect report --num-strips all`"
            )
        steps = self.cache.manifest.sampling.steps
        shown = shown_steps(steps, self.settings.num_frames)
        if len(shown) < steps:
            named = ", ".join(map(str, shown))
            notes.append(
                f"film strips show the steps {named} of 0 to {steps - 1}; for all of them use `secondcast inspect "
                f"report --num-frames {steps}`"
            )
        if len(made) < len(chosen):
            notes.append(f"{counted(len(chosen) - len(made), 'film strip')} missing: the shards are damaged")
        return made


def _strip_maker(
    cache: Cache, settings: ReportSettings, resolve: Resolve, device: torch.device, notes: list[str]
) -> StripMaker | None:
    sampling = cache.manifest.sampling
    try:
        folder = resolve(settings.teacher or settings.backbone or cache.manifest.source, DECODE_PARTS)
        decoder = load_recorded_decoder(folder, sampling, device)
    except TeacherError as error:
        if settings.teacher is not None:
            raise
        notes.append(
            f"no film strips: {error}; give a folder with vae/ by `secondcast inspect report --teacher FOLDER`"
        )
        return None
    return StripMaker(
        decoder=decoder,
        manifest=cache.manifest,
        steps=shown_steps(sampling.steps, settings.num_frames),
        side=settings.frame_size,
    )


def _head(location: str, manifest: Manifest, settings: ReportSettings) -> dict[str, Any]:
    return {
        "cache": location,
        "title": location.rstrip("/").rsplit("/", 1)[-1],
        "created_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "created_by": f"secondcast {version('secondcast')}",
        "schedule": {
            "sigmas": [rounded(value) for value in manifest.sampling.sigmas],
            "timesteps": [rounded(value) for value in manifest.sampling.timesteps],
        },
    }


def _strips_head(manifest: Manifest, settings: ReportSettings) -> dict[str, Any]:
    sampling = manifest.sampling
    return {
        "frame_px": frame_px(sampling, settings.frame_size),
        "steps": shown_steps(sampling.steps, settings.num_frames),
    }


def _unopened(
    location: str, manifest: Manifest, settings: ReportSettings, why: str, progress: Progress
) -> dict[str, Any]:
    """The report of a cache whose prompts, tokenizer or metadata are damaged."""
    integrity = check_files(location, progress)[0] if settings.verify_checksums else NOT_CHECKED
    names = ("index", "key", "prompt", "sources", "guidance", "sample_index", "held_out", "tokens")
    columns: dict[str, list[Any]] = {
        name: [] for name in ("source_names", *names, "velocity_rms", "final_rms", "non_finite")
    }
    left_out = "table, film strips and students are omitted"
    return {
        **_head(location, manifest, settings),
        "notes": [f"the cache cannot be read: {why}; {left_out}"],
        "summary": [["cache", f"{location} (cannot be read)"], ["teacher", manifest.source]],
        "integrity": integrity,
        "trajectories": columns,
        "strips": {**_strips_head(manifest, settings), "rows": []},
        "students": [],
        "pictures": NO_PICTURES,
    }
