"""`secondcast plan recipe`: estimate the cost of a recipe's builds, initial student and run."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from secondcast.cache_builder.settings import PlannedBuild, StoredAs
from secondcast.commands.build.build import build
from secondcast.commands.plan.build import build_plan, print_build
from secondcast.commands.plan.cards import Gpu, Tflops, hours_text
from secondcast.commands.plan.initial import initial_facts, initial_options, print_initial
from secondcast.commands.plan.train import print_train, train_plan
from secondcast.commands.plan.train_rows import AS_ASKED, FITTED
from secondcast.commands.shell.console import print_json, print_line
from secondcast.commands.shell.flags import with_flags
from secondcast.commands.shell.resolve import Json
from secondcast.commands.train.train import Budget
from secondcast.models.memory.options import GpuMemoryLimit
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.toml_file import EVIDENCE, read_toml, recipe_tables
from secondcast.trainer.settings import TrainOptions

# All options of `build`: those that a plan does not have are ignored.
_KEYS = {*signature(with_flags(build)).parameters} - {"cache", "config", "context"}


def plan_recipe(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="TOML file with [build.NAME] and [train], and any [init-student].")
    ],
    num_prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]N", help="Number of prompts of a build, instead of its prompt files; may be repeated."
        ),
    ] = None,
    time_budget: Budget = None,
    memory: GpuMemoryLimit = GpuMemoryLimit(),
    gpu: Gpu = None,
    tflops: Tflops = None,
    as_json: Json = False,
) -> None:
    """Estimate the cost of a recipe's builds, initial student and run. Loads and downloads no weights.

    Example: secondcast plan recipe recipes/flux-24gb.toml --num-prompts 50000 --gpu 4090 --time-budget 72h
    """
    tables, evidence = _tables(recipe)
    builds, caches = _builds(recipe, tables, num_prompts or []), _caches_of_builds(tables)
    initial = initial_options(recipe, tables["init-student"]) if "init-student" in tables else None
    named = [name for name, _, _ in builds.values()] + ([] if initial is None else [initial[0]])
    teacher, *others = dict.fromkeys(named)
    if others:
        raise SettingsError(
            f"the tables of {recipe} have the teachers {teacher} and {others[0]}, expected one teacher for the student"
        )
    to_come: dict[str, PlannedBuild] = {}
    facts: dict[str, Any] = {"build": {}}
    for name, (_, asked, prompts) in builds.items():
        facts["build"][name] = build_plan(teacher, asked, prompts, gpu, tflops)
        # Only the shapes of the run's caches matter, not their prompts.
        to_come |= dict.fromkeys(caches.get(name, [name]), asked.model_copy(update={"prompts": (), "limit": None}))
        if not as_json:
            print_line(f"build {name}", style="bold")
            print_build(facts["build"][name])
    facts["train"] = train_plan(
        None, recipe, time_budget, TrainOptions(), [], teacher, [], StoredAs(), memory, gpu, tflops, to_come,
        initial and initial[1],
    )  # fmt: skip
    if initial is not None:
        facts["init_student"] = initial_facts(initial[1], facts["train"]["student"]["parameters"])
    facts |= {"both_phases": _both_phases(facts), "evidence": evidence}
    if as_json:
        print_json(facts)
    else:
        if initial is not None:
            print_line("init-student", style="bold")
            print_initial(facts["init_student"])
        print_line("train", style="bold")
        print_train(facts["train"])
        _print_both(facts)


def _both_phases(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Hours of all builds and of the run (None if one is unknown), and bytes of all caches."""
    builds, way = list(facts["build"].values()), facts["train"]["ways"]
    compute = [one["compute"] for one in builds]
    hours = [each[name] for each in compute for name in ("text_hours", "sample_hours") if name in each]
    run = (way.get(FITTED) or way[AS_ASKED])["hours"]
    known = None not in (*hours, run)
    return {
        "hours": sum(hours) + run if known else None,
        "build_hours": sum(hours) if None not in hours else None,
        "stored_low_bytes": sum(one["disk"]["stored_low_bytes"] for one in builds),
        "stored_high_bytes": sum(one["disk"]["stored_high_bytes"] for one in builds),
    }


def _print_both(facts: Mapping[str, Any]) -> None:
    both = facts["both_phases"]
    low, high = (both[f"stored_{end}_bytes"] / 2**30 for end in ("low", "high"))
    hours = f"{hours_text(both['hours'])} hours (builds {hours_text(both['build_hours'])})"
    print_line(f"both phases: {hours}; caches {low:,.1f} to {high:,.1f} GiB on disk (estimated)", style="bold")
    print_line(f"evidence for the student's quality: {facts['evidence'] or 'none is stated by the recipe'}")


def _tables(recipe: Path) -> tuple[dict[str, Any], str]:
    """The tables of a recipe, and what it states as evidence."""
    values = read_toml(recipe, what=f"recipe {recipe}", expected="a recipe, see those in recipes/")
    tables = recipe_tables(recipe, values)
    if tables is None or not tables.get("build") or "train" not in tables:
        raise SettingsError(
            f"{recipe} lacks a [build.NAME] or [train]: expected both; plan build and plan train take --config as well"
        )
    return tables, values.get(EVIDENCE, "")


def _caches_of_builds(tables: Mapping[str, Any]) -> dict[str, list[str]]:
    """Names of the run's caches by the name of their folder, which is that of a build."""
    names: dict[str, list[str]] = {}
    for name, place in tables["train"].get("caches", {}).items():
        names.setdefault(Path(str(place)).name, []).append(name)
    return names


def _builds(
    recipe: Path, tables: Mapping[str, Any], counts: Sequence[str]
) -> dict[str, tuple[str, PlannedBuild, int | None]]:
    """Teacher, options and number of prompts of each build of a recipe; None: the number in its files."""
    numbers = _numbers(counts, list(tables["build"]))
    found = {}
    for name, table in tables["build"].items():
        options = {key.replace("-", "_"): value for key, value in table.items()}
        if "teacher" not in options:
            raise SettingsError(
                f"[build.{name}] of {recipe} has no teacher, expected a line such as teacher = 'pocket'"
            )
        if unknown := sorted(options.keys() - _KEYS):
            raise SettingsError(
                f"[build.{name}] of {recipe} has the unknown key {unknown[0]!r}, expected one of "
                f"{', '.join(sorted(key.replace('_', '-') for key in _KEYS))}"
            )
        known = {key: value for key, value in options.items() if key in PlannedBuild.model_fields}
        if numbers.get(name) is not None:
            known.pop("prompts", None)
        found[name] = (str(options["teacher"]), PlannedBuild.from_flags(**known), numbers.get(name))
    return found


def _numbers(counts: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for text in sorted(counts, key=lambda text: "=" in text):
        name, _, number = text.rpartition("=")
        if not number.isdecimal() or int(number) == 0 or (name and name not in names):
            raise SettingsError(
                f"--num-prompts is {text!r}, expected a number of prompts, or NAME=N for one of the builds "
                f"{', '.join(names)}"
            )
        numbers |= dict.fromkeys([name] if name else names, int(number))
    return numbers
