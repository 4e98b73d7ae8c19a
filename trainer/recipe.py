"""A recipe: a run as a TOML file, what holds for all of it at the top and a [[stage]] for each of its stages."""

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
    """What a recipe states: the run, and where its caches lie as far as it says so.

    caches: places by name, as after --cache: a relative one is below the current directory, not the recipe's.
    """

    settings: TrainSettings
    caches: dict[str, str]


def read_recipe(file: Path, *, beside: Collection[str] = (), **changes: Any) -> Recipe:
    """Read the run of a recipe: its [train] and [[train.stage]], or all of a file that has no tables for builds.

    beside: keys that others read. changes: precede what is stated for all of the run.

    Raises SettingsError, naming file, stage and key, for what cannot be read, is unknown, or out of range.
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
        raise SettingsError(f"{file} has no stage, expected a [[stage]] for each, see the recipes in recipes/")
    run = _of_the_run(file, stated) | changes
    if "student" not in run:
        raise SettingsError(f"{file} names no student: give --student, or a line such as student = 'google-t5/t5-base'")
    made = tuple(_stage(file, number, stage) for number, stage in enumerate(stages, start=1))
    return Recipe(settings=_checked(str(file), TrainSettings, run | {"stages": made}), caches=caches)


# Keys whose values stand elsewhere in a recipe, or are said in other words: field of TrainSettings -> key.
_SAID_OTHERWISE = {"stages": "stage", "time_budget_seconds": "time_budget"}


def _of_the_run(file: Path, stated: dict[str, Any]) -> dict[str, Any]:
    values = _names(str(file), stated)
    known = {_SAID_OTHERWISE.get(name, name) for name in TrainSettings.model_fields} | {"caches"}
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
            raise SettingsError(
                f"{where} has {name.replace('_', '-')} twice, with - and with _: leave one of them away"
            )
        values[name] = value
    return values


def _check_known(where: str, values: dict[str, Any], known: set[str]) -> None:
    if unknown := sorted(values.keys() - known):
        listed = ", ".join(sorted(name.replace("_", "-") for name in known))
        key = unknown[0].replace("_", "-")
        if key == "max_gpu_memory":
            # What fits is of a machine, and is written down as the options that it came to.
            raise SettingsError(
                f"{where} has the key 'max_gpu_memory', which is no part of a recipe: give --max-gpu-memory beside --config"
            )
        raise SettingsError(f"{where} has the unknown key {key!r}, expected one of {listed}")


def _checked(where: str, kind: type[Stage] | type[TrainSettings], values: dict[str, Any]) -> Any:
    try:
        # TOML has types: a text for a number, or true, is a slip.
        return kind.model_validate(values, strict=True)
    except ValidationError as error:
        raise SettingsError(f"{where}: {first_wrong_flag(error).removeprefix('--')}") from error


def seconds_of(text: str) -> float:
    """Seconds of a time such as 72h, 90m, 1.5d; SettingsError for another text."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhd])", text.strip())
    if found is None or float(found[1]) == 0:
        raise SettingsError(f"--time-budget is {text!r}, expected a time such as 72h, 90m or 3d")
    return float(found[1]) * _UNIT_SECONDS[found[2]]
