"""Teachers for planning, from configuration files alone; those of FLUX.1 are included in this package."""

from pathlib import Path

from secondcast.models.families.flux import FLUX
from secondcast.models.teacher.folder import BUILD_PARTS, TeacherFolder, find_teacher
from secondcast.storage_schemas.errors import TeacherError

_CONFIGS = Path(__file__).parents[1] / "configs"


def bundled_teachers() -> list[str]:
    """Names of the teachers whose configuration files are included."""
    return sorted(folder.name for folder in _CONFIGS.iterdir())


def planned_teacher(name: str) -> tuple[TeacherFolder, str]:
    """A teacher's configuration files and a description of their source; downloads and loads no weights.

    name: folder of a pipeline (configuration files are sufficient), or FLUX.1-dev or FLUX.1-schnell, with or without
        the owner's name.

    Raises TeacherError.
    """
    if Path(name).is_dir():
        folder = find_teacher(name, BUILD_PARTS)
        return folder, f"configuration files in {folder.path}"
    known = bundled_teachers()
    asked = name.lower().removeprefix(f"{FLUX.owner}/")
    found = next((bundled for bundled in known if bundled.lower() == asked), None)
    if found is None:
        raise TeacherError(
            f"no teacher {name!r} to plan for, expected a folder with the configuration files of a pipeline, or "
            f"one of {', '.join(known)}, whose files are included (plan downloads "
            "nothing)"
        )
    source = f"{FLUX.owner}/{found}"
    return TeacherFolder(
        path=_CONFIGS / found, source=source
    ), f"configuration files of {source} included in secondcast"
