"""Teachers and students by the names that users type; `pocket` and `pocket-small` are embedded."""

from pathlib import Path
from typing import TYPE_CHECKING

from secondcast.storage_schemas.errors import SettingsError

if TYPE_CHECKING:
    from secondcast.models.families.family import Role
    from secondcast.models.teacher.context_projection import ContextProjection
    from secondcast.models.teacher.folder import TeacherFolder
    from secondcast.storage_schemas.schema.manifest import Teacher

POCKET = "pocket"


def resolve_teacher(
    name: str, parts: "tuple[Role, ...]", revision: str | None = None, *, weights: bool = True
) -> "TeacherFolder":
    """A teacher by name; `pocket` is the embedded one, even if a path of that name exists.

    weights: whether to check the weights of these parts before any work; TeacherError if they do not fit.
    """
    from dataclasses import replace

    from secondcast.models.teacher.folder import find_teacher
    from secondcast.pocket import TEACHER_FOLDER

    if name == POCKET:
        found = replace(find_teacher(str(TEACHER_FOLDER), parts, revision=revision), source=POCKET)
    else:
        found = find_teacher(name, parts, revision=revision)
    if weights and not set(parts) <= {"scheduler", "large_tokenizer", "pooled_tokenizer"}:
        from secondcast.models.teacher.weights import check_teacher_weights

        check_teacher_weights(found, parts)
    return found


def resolve_context_projection(
    name: str, recorded: "Teacher | None", revision: str | None = None
) -> "ContextProjection":
    """The text projection of a teacher by name; from the hub, only that tensor is downloaded."""
    from dataclasses import replace

    from secondcast.models.teacher.context_projection import find_context_projection
    from secondcast.pocket import TEACHER_FOLDER

    if name == POCKET:
        return replace(find_context_projection(str(TEACHER_FOLDER), recorded, revision=revision), source=POCKET)
    return find_context_projection(name, recorded, revision=revision)


def student_source(name: str) -> str:
    """The source of a student; names such as `pocket-small` are embedded configurations."""
    from secondcast.pocket import STUDENTS_FOLDER

    if not name.startswith(f"{POCKET}-") or Path(name).is_dir():
        return name
    known = sorted(f"{POCKET}-{folder.name}" for folder in STUDENTS_FOLDER.iterdir())
    if name not in known:
        raise SettingsError(f"--student {name!r} is not an embedded student, expected one of {', '.join(known)}")
    return str(STUDENTS_FOLDER / name.removeprefix(f"{POCKET}-"))
