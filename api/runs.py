"""The settings of a run and the names of its caches, from options or a recipe, and [NAME=]CACHE."""

from collections.abc import Collection, Sequence
from pathlib import Path

from secondcast.models.memory.options import GpuMemoryLimit
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.toml_file import read_toml, recipe_tables
from secondcast.trainer.settings import TrainFlags, TrainOptions, TrainSettings


def run_of_options(
    student: str | None, time_budget: str | None, options: TrainOptions, *, max_gpu_memory: str | None
) -> TrainSettings:
    """The run that options ask for: pretraining, and the stage after it."""
    if student is None:
        raise SettingsError(
            "no student is given: give --student, such as google-t5/t5-base or pocket-small, or "
            "for FLUX.2-klein Qwen/Qwen3-0.6B"
        )
    if time_budget is not None:
        raise SettingsError(f"--time-budget is {time_budget} without a recipe, whose stages share it; give --steps")
    given = options.given
    if max_gpu_memory is not None and "quantize" in given:
        # Eight bits need it, and it is --max-gpu-memory that chooses.
        given = {"activation_checkpointing": 1} | given
    return TrainFlags.from_flags(student=student, **given).settings()


def run_of_recipe(
    file: Path, student: str | None, time_budget: str | None, options: TrainOptions, *, beside: Collection[str]
) -> tuple[TrainSettings, dict[str, str]]:
    """The run that a recipe states, and its caches; `options` are given beside it.

    beside: keys of the recipe that the caller reads.
    """
    from secondcast.trainer.recipe import read_recipe, seconds_of

    given = options.given
    if stages := [name for name in given if name not in TrainSettings.model_fields]:
        raise SettingsError(
            f"--{stages[0].replace('_', '-')} is given beside --config {file}: it is an option of a stage; change the "
            f"recipe, or leave one of them out"
        )
    changed = dict(given)
    if student is not None:
        changed["student"] = student
    if time_budget is not None:
        changed["time_budget_seconds"] = seconds_of(time_budget)
    found = read_recipe(file, beside=beside, **changed)
    return found.settings, found.caches


def check_no_arguments(file: Path, names: Collection[str]) -> None:
    """Raise SettingsError if a recipe has options of the command that secondcast.train takes as arguments.

    names: the arguments of secondcast.train.
    """
    stated = read_toml(file, what=f"recipe {file}", expected="a recipe, see those in recipes/")
    if (tables := recipe_tables(file, stated)) is not None:
        stated = tables.get("train", {})
    of_call = {*names, *GpuMemoryLimit.model_fields} - TrainSettings.model_fields.keys() - {"time_budget"}
    found = {name: value for key, value in stated.items() if (name := key.replace("-", "_")) in of_call}
    if found:
        keys = " and ".join(name.replace("_", "-") for name in found)
        arguments = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise SettingsError(
            f"{file} has {keys}, which only the command reads from a recipe, expected keys of the run: remove "
            f"{'it' if len(found) == 1 else 'them'} and call secondcast.train(..., {arguments})"
        )


def named_places(given: Sequence[str]) -> dict[str, str]:
    """Caches by name, from --cache [NAME=]CACHE; a cache without a name is named as its folder is."""
    places: dict[str, str] = {}
    for text in given:
        name, sign, place = text.partition("=")
        # A folder may have a sign of equality in its name, a name has no slash.
        if not sign or not name or "/" in name or Path(text).exists():
            place = text
            name = Path(text).resolve().name if "://" not in text else text.rstrip("/").rsplit("/", 1)[-1]
        if not place:
            raise SettingsError(f"--cache {text!r} names no place, expected [NAME=]CACHE, as in --cache {text}FOLDER")
        if name in places:
            raise SettingsError(
                f"two caches are named {name!r}, {places[name]} and {place}: name them, as in --cache {name}-2={place}"
            )
        places[name] = place
    return places
