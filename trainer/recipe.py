"""A recipe: a run as a TOML file, with shared options at the top and a [[stage]] for each stage."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.home import expand_home
from secondcast.storage_schemas.io.toml_file import read_toml, recipe_tables
from secondcast.storage_schemas.schema.flags import first_wrong_flag
from secondcast.trainer.settings import TrainSettings
from secondcast.trainer.stage import Stage

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Contents of a recipe: the run, and the locations of its caches if it states them.

    caches: locations by name, as for --cache; relative to the current directory, not to the recipe.
    """

    settings: TrainSettings
    caches: dict[str, str]


def read_recipe(file: Path, *, beside: Collection[str] = (), **changes: Any) -> Recipe:
    """Read the run of a recipe: its [train] and [[train.stage]], or the whole file if it has no tables for builds.

    beside: keys to ignore, which others read.
    changes: values that override the shared options.

    Raises SettingsError, naming file, stage and key, for a value that is unreadable, unknown, or out of range.
    """
    stated = read_toml(file, what=f"recipe {file}", expected="a recipe, see those in recipes/")
    if (tables := recipe_tables(file, stated)) is not None:
        stated = tables.get("train", {})
    of_others = set(beside) - TrainSettings.model_fields.keys() - {"time_budget"}
    stated = {key: value for key, value in stated.items() if key.replace("-", "_") not in of_others}
    caches = stated.pop("caches", {})
    if not isinstance(caches, dict) or not all(isinstance(place, str) for place in caches.values()):
        raise SettingsError(
            f'{file} has caches = {caches!r}, expected lines such as signs = "signs-cache" under [caches]'
        )
    caches = {name: expand_home(place) for name, place in caches.items()}
    if isinstance(student := stated.get("student"), str):
        stated["student"] = expand_home(student)
    stages = stated.pop("stage", [])
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise SettingsError(f"{file} has stage = {stages!r}, expected a [[stage]] for each stage")
    if not stages:
        raise SettingsError(f"{file} has no stage, expected at least one [[stage]], see the recipes in recipes/")
    run = _of_the_run(file, stated) | changes
    if "student" not in run:
        raise SettingsError(f"{file} names no student: give --student, or a line such as student = 'google-t5/t5-base'")
    validated = tuple(_stage(file, number, stage) for number, stage in enumerate(stages, start=1))
    return Recipe(settings=_checked(str(file), TrainSettings, run | {"stages": validated}), caches=caches)


# Fields of TrainSettings that have another key in a recipe.
_SAID_OTHERWISE = {"stages": "stage", "time_budget_seconds": "time_budget"}


def _of_the_run(file: Path, stated: dict[str, Any]) -> dict[str, Any]:
    values = _names(str(file), stated)
    # A function is given by secondcast.train alone.
    fields = TrainSettings.model_fields.keys() - {"loss_fn"}
    known = {_SAID_OTHERWISE.get(name, name) for name in fields} | {"caches"}
    _check_known(str(file), values, known)
    if (budget := values.pop("time_budget", None)) is None:
        return values
    if not isinstance(budget, str):
        raise SettingsError(f"{file}: time-budget is {budget!r}, expected a time such as '72h', '90m' or '3d'")
    try:
        return values | {"time_budget_seconds": seconds_of(budget)}
    except SettingsError as error:
        raise SettingsError(f"{file}: {str(error).removeprefix('--')}") from error


def _stage(file: Path, number: int, stated: dict[str, Any]) -> Stage:
    where = f"{file}, stage {stated.get('name', number)}"
    values = {"name": str(number), **_names(where, stated)}
    _check_known(where, values, set(Stage.model_fields))
    if "steps" in values and "budget_share" in values:
        raise SettingsError(f"{where}: both steps and budget-share are given, expected one of them")
    if isinstance(listed := values.get("caches"), list):
        if not all(isinstance(cache, str) for cache in listed) or len(set(listed)) < len(listed):
            raise SettingsError(
                f"{where} has caches = {listed!r}, expected names, each once, or their weights as in {{a = 10, b = 1}}"
            )
        values["caches"] = dict.fromkeys(listed, 1.0)
    stage: Stage = _checked(where, Stage, values)
    return stage


def _names(where: str, stated: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in stated.items():
        if (name := key.replace("-", "_")) in values:
            raise SettingsError(f"{where} has {name.replace('_', '-')} twice, with - and with _: remove one of them")
        values[name] = value
    return values


def _check_known(where: str, values: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(values.keys() - known):
        listed = ", ".join(sorted(name.replace("_", "-") for name in known))
        raise SettingsError(f"{where} has the unknown key {unknown[0].replace('_', '-')!r}, expected one of {listed}")


def _checked(where: str, kind: type[Stage] | type[TrainSettings], values: dict[str, Any]) -> Any:
    try:
        # TOML has types: a string or a boolean for a number is an error.
        return kind.model_validate(values, strict=True)
    except ValidationError as error:
        raise SettingsError(f"{where}: {first_wrong_flag(error).removeprefix('--')}") from error


def seconds_of(text: str) -> float:
    """Seconds of a time such as 72h, 90m or 1.5d; SettingsError for any other text."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", text.strip())
    if found is None or float(found[1]) == 0:
        raise SettingsError(f"--time-budget is {text!r}, expected a time such as 72h, 90m or 3d")
    return float(found[1]) * _UNIT_SECONDS[found[2]]
