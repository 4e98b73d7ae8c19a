"""A check of the pocket teacher at a size that takes seconds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from secondcast.check import teachers
from secondcast.check.check import Check, empty_results
from secondcast.check.recording import recording_rows
from secondcast.check.results import CheckResults, CheckRow
from secondcast.check.teachers import CheckTeacher, RandomTeacher, TeacherOnDisk
from secondcast.check.training import TrainingRows
from secondcast.models.teacher.folder import find_teacher
from secondcast.models.teacher.planned import planned_teacher
from secondcast.pocket import TEACHER_FOLDER
from secondcast.storage_schemas.progress import Silent

CPU = torch.device("cpu")
TINY = replace(teachers.POCKET, batch_size=2, steps=4, training_steps=3)


def pocket() -> TeacherOnDisk:
    return TeacherOnDisk(replace(find_teacher(str(TEACHER_FOLDER), ()), source="pocket"), TINY, CPU)


def random_pocket() -> RandomTeacher:
    """The way of random-flux at the size of the pocket teacher."""
    return RandomTeacher(replace(planned_teacher(str(TEACHER_FOLDER))[0], source="random-flux"), TINY, CPU)


def recorded(folder: Path, teacher: CheckTeacher | None = None) -> dict[str, CheckRow]:
    """The rows of a recording, by name."""
    return {row.name: row for row in recording_rows(teacher or pocket(), folder, Silent())}


def training_rows(folder: Path) -> TrainingRows:
    return TrainingRows(pocket(), folder, matrix_rate=1e9)


def run_check(
    folder: Path, teacher: CheckTeacher, results: CheckResults | None = None, *, minutes: float = 30.0, keep=None
) -> CheckResults:
    keep = keep or (lambda results, row: None)
    return Check(teacher, folder, results or empty_results(teacher), keep).run(minutes=minutes, progress=Silent())


@pytest.fixture(scope="session")
def check_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cache of a check."""
    folder = tmp_path_factory.mktemp("check")
    recorded(folder / "cache")
    return folder
