"""A recipe: a run as a TOML file, what holds for all of it at the top and a [[stage]] for each of its stages."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage_schemas.errors import BadSettings
from trainer.settings import TrainSettings
from trainer.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe states: the run, and where its caches lie as far as it says so."""

    settings: TrainSettings
    caches: dict[str, str]


def read_recipe(file: Path, **changes: Any) -> Recipe:
    """Read a recipe; `changes` go before what it states for all of the run.

    Raises BadSettings, naming file, stage and key, for what cannot be read, is unknown, or out of range.
    """
    try:
        stated: dict[str, Any] = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise BadSettings(
            f"{file} cannot be read as TOML ({error}): expected a recipe, see those in recipes/"
        ) from error
    caches = stated.pop("caches", {})
    if not isinstance(caches, dict) or not all(isinstance(place, str) for place in caches.values()):
        raise BadSettings(
            f'{file} has caches = {caches!r}, expected lines such as signs = "signs-cache" under [caches]'
        )
    stages = stated.pop("stage", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise BadSettings(f"{file} has stage = {stages!r}, expected a [[stage]] for each stage")
    if "stages" in stated:
        raise BadSettings(f"{file} has the unknown key 'stages', expected a [[stage]] for each stage")
    run = _names(stated) | changes
    if "student" not in run:
        raise BadSettings(f"{file} names no student: give --student, or a line such as student = 'google-t5/t5-base'")
    made = tuple(_stage(file, number, stage) for number, stage in enumerate(stages, start=1))
    return Recipe(settings=_checked(str(file), TrainSettings, run | {"stages": made}), caches=caches)


def _stage(file: Path, number: int, stated: dict[str, Any]) -> Stage:
    values = _names(stated)
    name = values.setdefault("name", str(number))
    if "steps" in values and "budget_share" in values:
        raise BadSettings(f"{file}, stage {name}: both steps and budget-share are given, expected one of them")
    if isinstance(listed := values.get("caches"), list):
        values["caches"] = {cache: 1.0 for cache in listed}
    stage: Stage = _checked(f"{file}, stage {name}", Stage, values)
    return stage


def _names(stated: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("-", "_"): value for key, value in stated.items()}


def _checked(where: str, kind: type[Stage] | type[TrainSettings], values: dict[str, Any]) -> Any:
    if unknown := sorted(values.keys() - kind.model_fields.keys()):
        known = ", ".join(sorted(name.replace("_", "-") for name in kind.model_fields))
        raise BadSettings(f"{where} has the unknown key {unknown[0].replace('_', '-')!r}, expected one of {known}")
    try:
        return kind.from_flags(**values)
    except BadSettings as error:
        raise BadSettings(f"{where}: {str(error).removeprefix('--')}") from error
