"""`secondcast check`: rows in the order of their importance, each kept as soon as it is made."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path

import secondcast
from secondcast.check import resume
from secondcast.check.machine import this_machine
from secondcast.check.pictures import ENCODERS, Pictures, picture_name
from secondcast.check.recording import recording_names, recording_rows
from secondcast.check.results import CheckResults, CheckRow
from secondcast.check.sampling import sampling_modes, sampling_name, sampling_row
from secondcast.check.steps import Training, cache_folder
from secondcast.check.teachers import CheckTeacher
from secondcast.check.training import ASSUMED_RATE_FRACTION, ONLINE, Mode, TrainingRows, modes
from secondcast.models.cost.counted import backbone_cost
from secondcast.models.cost.shapes import CallShapes
from secondcast.models.device import is_out_of_memory
from secondcast.models.memory.options import MemoryOptions
from secondcast.models.memory.peak import release_memory
from secondcast.models.teacher.pipeline_inputs import STEPS, ImageSize
from secondcast.storage_schemas.errors import MissingExtraError, NotACacheError, SettingsError, reason
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache

# Random weights are made on the device, or come from files and go to the device, with at least this rate: assumed.
_LOAD_BYTES_PER_SECOND = 5e9
# Three starts of the program, and two short runs, on a GPU.
_RESUME_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows that are made together. seconds: estimated. replays: whether they need the recorded cache."""

    names: tuple[str, ...]
    make: Callable[[], Iterable[CheckRow]]
    seconds: float
    replays: bool = True


class Check:
    """A check of a teacher on a device.

    folder: of the cache and the runs.
    results: those of an earlier call; its rows are kept, but for those that were not run.
    keep: called with the results after each row.
    """

    def __init__(
        self, teacher: CheckTeacher, folder: Path, results: CheckResults, keep: Callable[[CheckResults, CheckRow], None]
    ) -> None:
        self._teacher, self._folder, self.results, self._keep = teacher, folder, results, keep

    def run(self, *, minutes: float, progress: Progress) -> CheckResults:
        """Make the rows that are missing; none begins that would not end within the time, by estimate."""
        end = time.monotonic() + 60 * minutes
        for part in self._parts(progress):
            done = [row for name in part.names if (row := self.results.row(name)) and row.result != "not run"]
            if len(done) == len(part.names):
                continue
            release_memory(self._teacher.device)
            if time.monotonic() + part.seconds > end:
                rows = _left_out(part, f"it would exceed --minutes {minutes:g}")
            elif part.replays and not self._is_recorded:
                rows = _left_out(part, "the cache of the check is not complete: see the rows before")
            else:
                rows = _made(part)
            for row in rows:
                earlier = self.results.row(row.name)
                if earlier is not None and earlier.result != "not run":
                    continue
                self.results = self.results.with_row(row)
                self._keep(self.results, row)
        return self.results

    def _parts(self, progress: Progress) -> Iterator[_Part]:
        teacher, scale = self._teacher, self._teacher.scale
        cost = backbone_cost(CallShapes.of(teacher.planned[0]))
        rate = ASSUMED_RATE_FRACTION * self.results.machine.matrix_flops_per_second
        loading = 2 * cost.parameters * teacher.torch_dtype.itemsize / _LOAD_BYTES_PER_SECOND
        sampling = scale.batch_size * scale.steps * cost.forward_flops / rate
        yield _Part(
            names=recording_names(teacher),
            make=lambda: recording_rows(teacher, cache_folder(self._folder), progress),
            seconds=2 * loading + 3 * sampling,
            replays=False,
        )
        yield _Part(
            names=(ONLINE,),
            make=lambda: [self._training_rows.online()],
            seconds=2 * loading + self._training_rows.online_seconds(),
        )
        training_modes = modes(cost.blocks, table=teacher.has_table)
        yield from (self._mode(mode, loading) for mode in training_modes if mode.exact)
        for name, options in sampling_modes(cost.blocks, table=teacher.has_table).items():
            yield _Part(
                names=(sampling_name(name),),
                make=partial(self._sampled, name, options),
                seconds=loading + sampling,
            )
        yield _Part(names=(resume.NAME,), make=self._resumed, seconds=_RESUME_SECONDS)
        yield from (self._mode(mode, loading) for mode in training_modes if not mode.exact)
        # The last ones: the transformer of one stays for the next.
        for encoder in ENCODERS:
            seconds = loading + 2 * STEPS * self._picture_flops() / rate
            yield _Part(names=(picture_name(encoder),), make=partial(self._picture, encoder), seconds=seconds)

    def _picture_flops(self) -> float:
        teacher = self._teacher
        geometry = teacher.folder.geometry(ImageSize(resolution=teacher.scale.picture_resolution))
        shapes = CallShapes.of(teacher.planned[0]).model_copy(update={"image_tokens": geometry.image_tokens})
        return backbone_cost(shapes).forward_flops

    @property
    def _is_recorded(self) -> bool:
        try:
            cache = Cache.open(str(cache_folder(self._folder)))
        except NotACacheError:
            return False
        return len(cache.indices()) == self._teacher.scale.batch_size

    def _mode(self, mode: Mode, loading: float) -> _Part:
        rows = self._training_rows
        return _Part(names=rows.names(mode), make=partial(rows.mode, mode), seconds=loading + rows.seconds(mode))

    def _sampled(self, name: str, options: MemoryOptions) -> list[CheckRow]:
        return [sampling_row(self._teacher, self._training.cache, name, options)]

    def _resumed(self) -> list[CheckRow]:
        return [resume.resume_row(self._folder / "resume", device=str(self._teacher.device))]

    def _picture(self, encoder: str) -> list[CheckRow]:
        return [self._pictures.row(encoder)]

    @cached_property
    def _training(self) -> Training:
        return Training(self._teacher, self._folder)

    @cached_property
    def _training_rows(self) -> TrainingRows:
        rate = self.results.machine.matrix_flops_per_second
        return TrainingRows(self._teacher, self._folder, matrix_rate=rate)

    @cached_property
    def _pictures(self) -> Pictures:
        return Pictures(self._training)


def _made(part: _Part) -> Iterator[CheckRow]:
    """The rows of a part; those that an error kept from being made say so."""
    finished = set()
    try:
        for row in part.make():
            finished.add(row.name)
            yield row
        return
    except (SettingsError, MissingExtraError) as error:
        why, broken = reason(error), False
    # Whatever goes wrong in a row is a result, and the other rows are made.
    except Exception as error:
        why, broken = f"failed with {type(error).__name__}: {reason(error)}", True
        if is_out_of_memory(error):
            why, broken = "the GPU is out of memory", False
    for name in part.names:
        if name not in finished:
            yield CheckRow(name=name, result="broken" if broken else "not run", detail=why)


def _left_out(part: _Part, why: str) -> Iterator[CheckRow]:
    for name in part.names:
        yield CheckRow(name=name, result="not run", detail=why)


def empty_results(teacher: CheckTeacher) -> CheckResults:
    """Results without rows, with the rates of this machine measured."""
    return CheckResults(
        version=secondcast.__version__,
        date=datetime.now(UTC).date().isoformat(),
        teacher=teacher.folder.source,
        machine=this_machine(teacher.device, teacher.torch_dtype),
    )
