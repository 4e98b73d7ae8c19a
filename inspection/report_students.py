"""Students in a report: evaluated on held-out trajectories of the cache, or taken from records of evaluations."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.closed_loop import RECORDED, closed_loop
from evaluation.held_out import HeldOut, held_out_trajectories, spread
from evaluation.on_cache import CacheScoring
from evaluation.open_loop import open_loop
from evaluation.picture_distances import check_measurable
from evaluation.replaying import CacheStudent, cached_embeddings
from evaluation.results import Evaluation, Led, StepErrors
from inspection.report_curves import run_curves
from inspection.report_integrity import Readable
from inspection.report_strips import StripMaker
from inspection.report_table import rounded
from models.backbone import FluxBackbone
from models.quantized import check_quantizer
from models.recorded_backbone import load_recorded_backbone
from models.schedule import DTYPES
from models.student import student_folder
from models.teacher_folder import TeacherFolder
from storage_schemas.errors import BadSettings, BadStudent, DamagedCache, MissingExtra, NonFinite, NotInCache
from storage_schemas.fields import Array
from storage_schemas.progress import Progress
from storage_schemas.reader import Cache


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A student by the name that the report shows; `network` where it is evaluated, `record` where it was before."""

    name: str
    place: Path
    network: CacheStudent | None = None
    record: Evaluation | None = None


@dataclass(frozen=True, kw_only=True)
class Students:
    """Students as the page takes them, notes, and the mean error of each row of the table that has one."""

    facts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hardness: dict[int, float] = field(default_factory=dict)


def open_students(
    cache: Cache, students: Sequence[Path], evaluations: Sequence[Path], device: torch.device
) -> list[Asked]:
    """All that were asked for, checked against the cache: BadStudent, BadSettings."""
    opened = [Asked(name="", place=place, network=CacheStudent.open(place, cache, device)) for place in students]
    digest = cache.manifest.digests()["sampling"]
    for file in evaluations:
        record = Evaluation.read(file)
        if record.sampling_digest != digest:
            raise BadSettings(
                f"{file} was evaluated on a cache with sampling {record.sampling_digest[:12]} ({record.cache}), "
                f"{cache.folder} has {digest[:12]}: its numbers are of other trajectories; evaluate the student "
                f"on this cache, with --student"
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


@dataclass(frozen=True, kw_only=True)
class Evaluating:
    """What students are evaluated with: the recorded backbone, loaded once; maker: None without a VAE."""

    readable: Readable
    backbone: FluxBackbone
    scoring: CacheScoring
    device: torch.device
    maker: StripMaker | None
    progress: Progress

    def run(self, asked: Sequence[Asked], row_of: Mapping[str, int]) -> Students:
        """Open loop of each student on the same trajectories, closed loop on some of them.

        row_of: rows of the table by key.
        """
        notes: list[str] = []
        chosen = self._chosen(notes)
        facts = []
        led = self._closed(asked, chosen, row_of, notes) if chosen and self.scoring.closed_loop else {}
        floor = self._floor(chosen, notes) if chosen else None
        rows = [row_of[one.key] for one in chosen]
        for one in asked:
            assert one.network is not None
            errors = self._errors(one.name, one.network, chosen, notes) if chosen else None
            facts.append(_facts(one, rows, self._steps, errors, floor, led.get(one.name)))
        return Students(facts=facts, notes=notes, hardness=_hardness(facts))

    @property
    def _steps(self) -> tuple[int, ...]:
        return tuple(range(self.readable.cache.manifest.sampling.steps))

    def _chosen(self, notes: list[str]) -> list[HeldOut]:
        try:
            everything = held_out_trajectories(self.readable.cache)
        except (NotInCache, DamagedCache) as error:
            notes.append(f"students were not evaluated: {error}")
            return []
        wanted = [everything[place] for place in spread(everything, self.scoring.count)]
        chosen = [one for one in wanted if self._is_whole(one)]
        notes.append(f"students on {len(chosen):,} of {len(everything):,} held-out trajectories, spread over sources")
        if len(chosen) < len(wanted):
            notes.append(
                f"{len(wanted) - len(chosen):,} held-out trajectories are left out: damaged, or not finite"
            )  # fmt: skip
        return chosen

    def _is_whole(self, one: HeldOut) -> bool:
        trajectory = self.readable.trajectory(one.index)
        if trajectory is None:
            return False
        arrays = (trajectory.noise_SC, trajectory.velocity_KSC, trajectory.final_latent_SC)
        return all(np.isfinite(array.astype(np.float32)).all() for array in arrays) and self._has_pooled(one)

    def _has_pooled(self, one: HeldOut) -> bool:
        return self.readable.cache.manifest.teacher.pooled == "zero" or self.readable.has_embedding(one.prompt)

    def _floor(self, chosen: Sequence[HeldOut], notes: list[str]) -> StepErrors | None:
        if not all(self.readable.has_embedding(one.prompt) for one in chosen):
            notes.append("no replay floor: the cache has not the teacher's embedding of every prompt")
            return None
        return self._open_loop("floor", cached_embeddings(self.readable.cache, self.device), chosen, notes)

    def _errors(
        self, name: str, network: CacheStudent, chosen: Sequence[HeldOut], notes: list[str]
    ) -> StepErrors | None:
        return self._open_loop(name, network.embeddings, chosen, notes)

    def _open_loop(self, name: str, embed: Any, chosen: Sequence[HeldOut], notes: list[str]) -> StepErrors | None:
        try:
            return open_loop(
                self.readable.cache, self.backbone, {name: embed}, chosen, self._steps,
                batch_size=self.scoring.batch_size, progress=self.progress,
            )[name]  # fmt: skip
        except NonFinite as error:
            notes.append(f"{name} has no errors here: {error}")
            return None

    def _closed(
        self, asked: Sequence[Asked], chosen: Sequence[HeldOut], row_of: Mapping[str, int], notes: list[str]
    ) -> dict[str, dict[str, Any]]:
        sampling = self.readable.cache.manifest.sampling
        if self.maker is None:
            notes.append("no closed loop: it needs the VAE")
            return {}
        try:
            check_measurable(sampling.height, sampling.width)
        except (MissingExtra, BadSettings) as error:
            notes.append(f"no closed loop: {error}")
            return {}
        wanted = [chosen[place] for place in spread(chosen, self.scoring.closed_loop)]
        found = {}
        for one in asked:
            assert one.network is not None
            pictures: dict[str, str] = {}

            def keep(leader: str, led: HeldOut, picture_HWC: Array, pictures: dict[str, str] = pictures) -> None:
                assert self.maker is not None
                if leader != RECORDED:
                    pictures[led.key] = self.maker.picture(picture_HWC)

            try:
                led = closed_loop(
                    self.readable.cache, self.backbone, self.maker.decoder, {one.name: one.network.embeddings}, wanted,
                    lpips=None, batch_size=self.scoring.batch_size, progress=self.progress, keep=keep,
                )[one.name]  # fmt: skip
            except NonFinite as error:
                notes.append(f"{one.name} leads no sampling: {error}")
                continue
            found[one.name] = _led_facts(
                led, [row_of[chosen.key] for chosen in wanted], [pictures[chosen.key] for chosen in wanted]
            )
        return found


def load_backbone(
    cache: Cache, teacher: TeacherFolder, scoring: CacheScoring, device: torch.device
) -> FluxBackbone:  # fmt: skip
    """The recorded transformer, in the dtype that is asked for."""
    options = scoring.memory_of(cache.manifest)
    check_quantizer(options.quantize)
    return load_recorded_backbone(
        [cache.manifest],
        teacher,
        dtype=DTYPES[scoring.dtype_of(cache.manifest)],
        batch_rows=scoring.batch_size,
        options=options,
        attention_backend=None,
        device=device,
    )


def of_records(asked: Sequence[Asked], row_of: Mapping[str, int]) -> Students:
    """Students that were evaluated before; BadSettings for one of other trajectories alone."""
    facts, notes = [], []
    for one in asked:
        record = one.record
        assert record is not None
        kept = [place for place, found in enumerate(record.trajectories) if found.key in row_of]
        if not kept:
            raise BadSettings(
                f"the evaluation of {record.student} has {len(record.trajectories)} trajectories of {record.cache}, "
                f"none of which is in this cache: evaluate the student on it, with --student"
            )
        notes.append(f"{one.name}: an evaluation of {len(record.trajectories):,} held-out trajectories made before")
        if len(kept) < len(record.trajectories):
            notes.append(f"{one.name}: {len(record.trajectories) - len(kept):,} of them are not in this cache")
        rows = [row_of[record.trajectories[place].key] for place in kept]
        errors = _part(record.errors, kept)
        floor = None if record.floor is None else _part(record.floor, kept)
        facts.append(_facts(one, rows, record.steps, errors, floor, _recorded_led(record, row_of)))
    return Students(facts=facts, notes=notes, hardness=_hardness(facts))


def without_errors(asked: Sequence[Asked]) -> Students:
    """Students that are not evaluated: what their folders say."""
    return Students(facts=[_facts(one, [], (), None, None, None) for one in asked])


def _part(errors: StepErrors, places: Sequence[int]) -> StepErrors:
    return StepErrors(
        error_fraction=tuple(errors.error_fraction[place] for place in places),
        mean_square=tuple(errors.mean_square[place] for place in places),
    )


def _recorded_led(record: Evaluation, row_of: Mapping[str, int]) -> dict[str, Any] | None:
    closed = record.closed_loop
    if closed is None or "student" not in closed.leaders:
        return None
    keys = [record.trajectories[place].key for place in closed.trajectories]
    kept = [number for number, key in enumerate(keys) if key in row_of]
    facts = _led_facts(closed.leaders["student"], [row_of.get(key, -1) for key in keys], [])
    # An evaluation keeps no pictures.
    return {name: [column[number] for number in kept] if column else [] for name, column in facts.items()}


def _led_facts(led: Led, rows: list[int], pictures: list[str]) -> dict[str, Any]:
    return {
        "rows": rows,
        "latent_fraction": [rounded(value) for value in led.latent_fraction],
        "psnr_db": [rounded(value) for value in led.psnr_db],
        "ssim": [rounded(value) for value in led.ssim],
        "final": pictures,
    }


def _facts(
    one: Asked,
    rows: list[int],
    steps: Sequence[int],
    errors: StepErrors | None,
    floor: StepErrors | None,
    closed: dict[str, Any] | None,
) -> dict[str, Any]:
    return {
        "name": one.name,
        "parameters": _parameters(one),
        "rows": rows if errors is not None else [],
        "steps": list(steps) if errors is not None else [],
        "errors": [] if errors is None else _numbers(errors),
        "floor": None if floor is None or errors is None else _numbers(floor),
        "closed": closed,
        "curves": run_curves(one.place),
    }


def _numbers(errors: StepErrors) -> list[list[float | None]]:
    return [[rounded(value) for value in row] for row in errors.error_fraction]


def _parameters(one: Asked) -> int | None:
    """Of the network, or of the weight files where an evaluated student still lies; None where it does not."""
    if one.network is not None:
        return sum(parameter.numel() for parameter in one.network.network.parameters())
    try:
        files = sorted(student_folder(one.place).glob("*.safetensors"))
        return sum(_stored_values(file) for file in files) or None
    except (BadStudent, OSError, ValueError, LookupError, TypeError):
        return None


def _stored_values(file: Path) -> int:
    with file.open("rb") as data:
        header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _hardness(facts: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Mean error by row, over steps and students."""
    found: dict[int, list[float]] = {}
    for one in facts:
        for row, errors in zip(one["rows"], one["errors"], strict=True):
            found.setdefault(row, []).append(float(np.mean([value for value in errors if value is not None] or [0.0])))
    return {row: float(np.mean(means)) for row, means in found.items()}
