"""Check the weights of a teacher against its classes, from the headers of their files, before any work."""

from collections.abc import Sequence
from typing import Any

import diffusers
import transformers

from secondcast.models.families.family import Role
from secondcast.models.teacher.folder import TeacherFolder, part_source
from secondcast.models.weights.checked_loading import check_weights

# By what a configuration states; those of diffusers have the names of their classes.
_TEXT_ENCODERS = {"t5": transformers.T5EncoderModel, "clip_text_model": transformers.CLIPTextModel}


def check_teacher_weights(teacher: TeacherFolder, parts: Sequence[Role]) -> None:
    """Raise TeacherError unless these parts of a teacher can be loaded; parts without weights pass."""
    for role in parts:
        if (kind := _class_of(teacher, role)) is not None:
            folder = teacher.part(role)
            check_weights(kind, folder, part_source(folder))


def _class_of(teacher: TeacherFolder, role: Role) -> Any:
    kind = teacher.family.parts[role].kind
    if kind is None or role == "scheduler":
        return None
    return _TEXT_ENCODERS.get(kind) or getattr(diffusers, kind)
