"""The configuration files of a teacher's folder: its family, and checks before anything is loaded."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secondcast.models.families.family import Family, Role
from secondcast.models.families.registry import FAMILIES, family_of_pipeline, supported_models
from secondcast.storage_schemas.errors import TeacherError


def config_name(folder: str) -> str:
    """The file name of the configuration in a part's folder."""
    return "scheduler_config.json" if folder == "scheduler" else "config.json"


def read_config(file: Path, part: str) -> dict[str, Any]:
    """A JSON object; TeacherError if there is none."""
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise TeacherError(f"{file} cannot be read ({error}): the teacher's {part} is incomplete") from error
    if not isinstance(config, dict):
        raise TeacherError(f"{file} is a {type(config).__name__}, expected an object: the teacher's {part} is damaged")
    return config


def family_of_folder(path: Path) -> Family:
    """The family that model_index.json states; without that file, the first one with the transformer's class.

    TeacherError for a pipeline that no family has.
    """
    index = path / "model_index.json"
    stated = read_config(index, "model index") if index.is_file() else {}
    named = stated.get("_class_name")
    if named is None:
        return _family_by_transformer(path)
    family = family_of_pipeline(str(named))
    if family is None:
        expected = " or ".join(repr(known.pipeline) for known in FAMILIES)
        raise TeacherError(f"{index} has _class_name = {named!r}, expected {expected}: {supported_models()}")
    family.check_index(stated, str(index))
    return family


def _family_by_transformer(path: Path) -> Family:
    file = path / "transformer/config.json"
    named = read_config(file, "transformer").get("_class_name") if file.is_file() else None
    return next((family for family in FAMILIES if family.transformer == named), FAMILIES[0])


def check_parts(path: Path, family: Family, roles: Sequence[Role]) -> None:
    """Raise TeacherError unless these parts are of the family's classes.

    A configuration that names no class passes.
    """
    for role in roles:
        part = family.parts[role]
        if part.kind is None:
            continue
        file = path / part.folder / config_name(part.folder)
        config = read_config(file, part.folder)
        if (found := config.get(str(part.key))) not in (None, part.kind, *part.also):
            raise TeacherError(f"{file} has {part.key} = {found!r}, expected {part.kind!r}: {supported_models()}")
        if missing := [name for name in part.needs if name not in config]:
            raise TeacherError(
                f"{file} has no {missing[0]}: not the {part.folder} of a {family.title} teacher; {supported_models()}"
            )
        if role == "transformer":
            family.check_transformer(config, str(file))
        if role == "large_text_encoder":
            family.check_text_encoder(config, str(file))
