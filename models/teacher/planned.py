"""Teachers for planning, from configuration files alone; those of FLUX.1 are included in this package."""

from pathlib import Path

from secondcast.models.families.flux import FLUX
from secondcast.models.teacher.folder import BUILD_PARTS, TeacherFolder, find_teacher
from secondcast.storage_schemas.errors import TeacherError

_CONFIGS = Path(__file__).parents[1] / "configs"


def planned_teacher(name: str) -> tuple[TeacherFolder, str]:
    """A teacher's configuration files and a description of their source; downloads and loads no weights.

    name: folder of a pipeline (configuration files are sufficient), or FLUX.1-dev or FLUX.1-schnell, with or without
        the owner's name.

    Raises TeacherError.
    """
    if Path(name).is_dir():
        folder = find_teacher(name, BUILD_PARTS)
        return folder, f"configuration files in {folder.path}"
    known = {folder.name.lower(): folder for folder in sorted(_CONFIGS.iterdir())}
    found = known.get(name.lower().removeprefix(f"{FLUX.owner}/"))
    if found is None:
        raise TeacherError(
            f"no teacher {name!r} to plan for, expected a folder with the configuration files of a pipeline, or "
            f"one of {', '.join(folder.name for folder in known.values())}, whose files are included (plan downloads "
            "nothing)"
        )
    source = f"{FLUX.owner}/{found.name}"
    return TeacherFolder(path=found, source=source), f"configuration files of {source} included in secondcast"
