"""Check the weights of a teacher against its classes, from the headers of their files, before any work."""

from collections.abc import Sequence
from typing import Any

import diffusers
import transformers

from secondcast.models.families.family import Role
from secondcast.models.teacher.folder import TeacherFolder, needed_parts, part_source
from secondcast.models.weights.checked_loading import check_weights


def check_teacher_weights(teacher: TeacherFolder, parts: Sequence[Role]) -> None:
    """Raise TeacherError unless these parts of a teacher can be loaded; parts without weights pass."""
    for role in needed_parts(teacher.family, parts):
        if (kind := _class_of(teacher, role)) is not None:
            folder = teacher.part(role)
            check_weights(kind, folder, part_source(folder))


def _class_of(teacher: TeacherFolder, role: Role) -> Any:
    part = teacher.family.parts[role]
    if part.kind is None or role == "scheduler":
        return None
    return getattr(diffusers, part.kind) if part.loaded_as is None else getattr(transformers, part.loaded_as)
