"""Teachers for planning, from configuration files alone; some are included in this package."""

from pathlib import Path

from secondcast.models.teacher.configs import family_of_folder
from secondcast.models.teacher.folder import BUILD_PARTS, TeacherFolder, find_teacher
from secondcast.storage_schemas.errors import TeacherError

CONFIGS = Path(__file__).parents[1] / "configs"


def bundled_teachers() -> list[str]:
    """Names of the teachers whose configuration files are included."""
    return sorted(folder.name for folder in CONFIGS.iterdir())


def planned_teacher(name: str) -> tuple[TeacherFolder, str]:
    """A teacher's configuration files and a description of their source; downloads and loads no weights.

    name: folder of a pipeline (configuration files are sufficient), or one of bundled_teachers, with or without the
        owner's name.

    Raises TeacherError.
    """
    if Path(name).is_dir():
        folder = find_teacher(name, BUILD_PARTS)
        return folder, f"configuration files in {folder.path}"
    known = bundled_teachers()
    owners = {bundled: family_of_folder(CONFIGS / bundled).owner for bundled in known}
    names = {text.lower(): bundled for bundled, owner in owners.items() for text in (bundled, f"{owner}/{bundled}")}
    found = names.get(name.lower())
    if found is None:
        raise TeacherError(
            f"no teacher {name!r} to plan for, expected a folder with the configuration files of a pipeline, or "
            f"one of {', '.join(known)}, whose files are included (plan downloads "
            "nothing)"
        )
    source = f"{owners[found]}/{found}"
    return TeacherFolder(path=CONFIGS / found, source=source), f"configuration files of {source} included in secondcast"
