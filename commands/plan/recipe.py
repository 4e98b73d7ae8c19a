"""`secondcast plan recipe`: estimate the cost of a recipe's builds, initial student and run."""

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from secondcast.cache_builder.settings import PlannedBuild, StoredAs
from secondcast.commands.build.build import build
from secondcast.commands.plan.build import build_plan, print_build
from secondcast.commands.plan.cards import GpuChoice, card_names
from secondcast.commands.plan.initial import initial_facts, initial_options, print_initial
from secondcast.commands.plan.train import print_train, train_plan
from secondcast.commands.plan.train_rows import AS_ASKED
from secondcast.commands.plan.verdict import RentedGpu, both_phases, print_both, verdict_text
from secondcast.commands.shell.console import print_json, print_line
from secondcast.commands.shell.flags import with_flags
from secondcast.commands.shell.resolve import Json
from secondcast.commands.train.train import Budget
from secondcast.models.memory.options import GpuMemoryLimit
from secondcast.storage_schemas.errors import PromptsError, SettingsError
from secondcast.storage_schemas.io.toml_file import EVIDENCE, read_toml, recipe_tables
from secondcast.trainer.settings import TrainOptions

BuildGpu = Annotated[
    str | None, typer.Option(autocompletion=card_names, help="GPU of the builds by name, such as h100.")
]
TrainGpu = Annotated[
    str | None, typer.Option(autocompletion=card_names, help="GPU of the training by name, such as 4070.")
]
BuildTflops = Annotated[float | None, typer.Option(help="TFLOP/s that --build-gpu achieves, instead of the estimate.")]
TrainTflops = Annotated[float | None, typer.Option(help="TFLOP/s that --train-gpu achieves, instead of the estimate.")]
BuildPrice = Annotated[
    float | None,
    typer.Option(min=0, help="USD per hour of --build-gpu, 0 for your own; default: an assumed rent by its name."),
]
TrainPrice = Annotated[
    float | None,
    typer.Option(min=0, help="USD per hour of --train-gpu, 0 for your own; default: an assumed rent by its name."),
]

# All options of `build`: those that a plan does not have are ignored.
_KEYS = {*signature(with_flags(build)).parameters} - {"cache", "config", "context"}


def plan_recipe(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="TOML file with [build.NAME], [train], and optionally [init-student]."),
    ],
    num_prompts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]N", help="Number of prompts of a build, instead of its prompt files; may be repeated."
        ),
    ] = None,
    time_budget: Budget = None,
    memory: GpuMemoryLimit = GpuMemoryLimit(),
    build_gpu: BuildGpu = None,
    train_gpu: TrainGpu = None,
    build_tflops: BuildTflops = None,
    train_tflops: TrainTflops = None,
    build_price: BuildPrice = None,
    train_price: TrainPrice = None,
    as_json: Json = False,
) -> None:
    """Estimate the cost of a recipe's builds, initial student and run. Loads and downloads no weights.

    Example: secondcast plan recipe recipes/flux-24gb.toml --num-prompts 50000 --build-gpu h100 --train-gpu 4090
    --time-budget 72h
    """
    building = RentedGpu(gpu=GpuChoice(name=build_gpu, tflops=build_tflops, phase="build"), usd_per_hour=build_price)
    training = RentedGpu(gpu=GpuChoice(name=train_gpu, tflops=train_tflops, phase="train"), usd_per_hour=train_price)
    facts = recipe_plan(recipe, num_prompts or [], time_budget, memory, building, training)
    if as_json:
        print_json(facts)
    else:
        _print_recipe(facts)


def recipe_plan(
    recipe: Path,
    num_prompts: Sequence[str],
    time_budget: str | None,
    memory: GpuMemoryLimit,
    building: RentedGpu,
    training: RentedGpu,
) -> dict[str, Any]:
    """The estimated cost of a recipe, as JSON types; arguments: see plan_recipe."""
    tables, evidence = _tables(recipe)
    builds, caches = _builds(recipe, tables, num_prompts), _caches_of_builds(tables)
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
        try:
            facts["build"][name] = build_plan(teacher, asked, prompts, building.gpu)
        except PromptsError as error:
            raise PromptsError(f"{error}; or give --num-prompts {name}=N, a plan without the file") from error
        # Only the shapes of the run's caches matter, not their prompts.
        to_come |= dict.fromkeys(caches.get(name, [name]), asked.model_copy(update={"prompts": (), "limit": None}))
    facts["train"] = train_plan(
        None, recipe, time_budget, TrainOptions(), [], teacher, [], StoredAs(), memory, training.gpu, to_come,
        initial and initial[1],
    )  # fmt: skip
    if initial is not None:
        facts["init_student"] = initial_facts(initial[1], facts["train"]["student"]["parameters"])
    read = {name for stage in facts["train"]["ways"][AS_ASKED]["stages"] for name in stage["caches"]}
    copied = [name for name in builds if read & {*caches.get(name, [name])}]
    both = both_phases(facts, copied, building, training, memory.max_gpu_memory)
    return {**facts, "both_phases": {"verdict": verdict_text(both), **both}, "evidence": evidence}


def _print_recipe(facts: Mapping[str, Any]) -> None:
    print_both(facts)
    for name, plan in facts["build"].items():
        print_line(f"build {name}", style="bold")
        print_build(plan)
    if "init_student" in facts:
        print_line("init-student", style="bold")
        print_initial(facts["init_student"])
    print_line("train", style="bold")
    print_train(facts["train"])


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
    caches = tables["train"].get("caches")
    # Anything else is refused with the rest of [train].
    for name, place in (caches if isinstance(caches, dict) else {}).items():
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
        if isinstance(known.get("prompts"), str):
            # As `build --config` reads it.
            known["prompts"] = [known["prompts"]]
        try:
            asked = PlannedBuild.from_flags(**known)
        except SettingsError as error:
            raise SettingsError(f"[build.{name}] of {recipe}: {str(error).removeprefix('--')}") from error
        found[name] = (str(options["teacher"]), asked, numbers.get(name))
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
