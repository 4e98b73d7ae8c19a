"""`secondcast plan train`: estimate hours and memory of a run, from flags or a recipe."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.api.runs import named_places, run_of_options
from secondcast.cache_builder.settings import PlannedBuild, StoredAs
from secondcast.commands.plan.cards import (
    Gpu,
    GpuChoice,
    Tflops,
    count_text,
    figure_table,
    fit_facts,
    gpu_facts,
    hours_text,
    number_text,
    outline,
    print_figures,
    print_gpu,
    rate_of,
)
from secondcast.commands.plan.initial import planned_student
from secondcast.commands.shell.config_file import Config, has_stages
from secondcast.commands.shell.console import print_facts, print_json, print_wrapped
from secondcast.commands.shell.resolve import Json, quiet_imports, student_source
from secondcast.commands.train.train import Budget, asked_of_recipe
from secondcast.models.memory.options import GpuMemoryLimit
from secondcast.models.student.initial.settings import InitialOptions
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted, duration_text
from secondcast.trainer.loss_kinds import LOSSES
from secondcast.trainer.settings import TrainOptions

if TYPE_CHECKING:
    from secondcast.storage_schemas.schema.manifest import Manifest
    from secondcast.trainer.settings import TrainSettings

_GIB = 2**30
_WAYS = {
    "as_asked": "as asked",
    "fitted": "with --max-gpu-memory",
    "activation_checkpointing_1": "--activation-checkpointing 1",
}
_ONLY = "cache"


def plan_train(
    student: Annotated[
        str | None,
        typer.Option(help="Student: small, base, large or xl, Qwen/Qwen3-0.6B, a hub name, a config, or pocket-small."),
    ] = None,
    time_budget: Budget = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]CACHE", help="Existing cache; give --teacher for planned caches."),
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="Teacher of planned caches, as for plan build.")] = None,
    resolution: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PIXELS", help="Resolution of the planned caches, or of the one named NAME."),
    ] = None,
    stored: StoredAs = StoredAs(),
    options: TrainOptions = TrainOptions(),
    memory: GpuMemoryLimit = GpuMemoryLimit(),
    gpu: Gpu = None,
    tflops: Tflops = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Estimate the cost of training a student, beside the paper's recipe. Loads and downloads no weights.

    Planned caches are assumed to be of equal size.

    Example: secondcast plan train --teacher FLUX.1-dev --student base --batch-size 4 --steps 50000 --gpu 4090
    """
    recipe = config if has_stages(config) else None
    facts = train_plan(
        student, recipe, time_budget, options, cache or [], teacher, resolution or [], stored, memory,
        GpuChoice(name=gpu, tflops=tflops),
    )  # fmt: skip
    if as_json:
        print_json(facts)
    else:
        print_train(facts)


def train_plan(
    student: str | None,
    recipe: Path | None,
    time_budget: str | None,
    options: TrainOptions,
    cache: Sequence[str],
    teacher: str | None,
    resolution: Sequence[str],
    stored: StoredAs,
    memory: GpuMemoryLimit,
    gpu: GpuChoice,
    builds: Mapping[str, PlannedBuild] | None = None,
    initial: InitialOptions | None = None,
) -> dict[str, Any]:
    """The estimated cost of a run, as JSON types.

    recipe: a file with stages.
    builds: builds of planned caches, by name; `stored` and `resolution` describe the others.
    initial: the planned student that the run starts from, instead of an existing one.

    For the other arguments see plan_train.
    """
    from secondcast.api.fitting import stated_options

    fit_bytes = gpu.limit_bytes(memory.max_gpu_memory)
    if recipe is not None:
        asked, stated = asked_of_recipe(recipe, student, time_budget, options)
    else:
        asked, stated = run_of_options(student, time_budget, options, max_gpu_memory=memory.max_gpu_memory), {}
    card = gpu.card()
    manifests, configs = _manifests(asked, stated, cache, teacher, resolution, stored, builds or {})
    # The rate is that of the transformer, where a cache has trajectories.
    first = min(manifests.values(), key=lambda manifest: manifest.is_text)
    backbone_dtype = None if asked.backbone_dtype == "cache" else asked.backbone_dtype
    rate = rate_of(gpu, first, backbone_dtype)
    from secondcast.commands.plan.train_rows import fit_verdicts, train_facts, ways_of
    from secondcast.trainer.cost.stage_cost import costs_of

    gpu_bytes = card.memory_gib * _GIB if card else None
    memory_bytes = gpu_bytes if fit_bytes is None else fit_bytes
    source = student_source(asked.student) if initial is None else planned_student(initial, first.teacher)
    rank = asked.projection_rank if initial is None else initial.projection_rank
    costs = costs_of(manifests, source, projection_rank=rank, gpu_bytes=gpu_bytes or memory_bytes)
    if costs.backbones:
        asked.check_depth(costs.blocks)
    held = stated_options(asked, None if recipe is not None else options.given)
    verdicts, fitted = fit_verdicts(asked, costs, memory_bytes, card if memory.max_gpu_memory is None else None, held)
    facts = train_facts(ways_of(asked, fitted, named=memory_bytes is not None), costs, rate_flops=rate.flops_per_s)
    facts = {"teacher": {"source": first.source, "configs": configs}, **facts}
    fits = []
    if memory_bytes is not None:
        fix = None if fitted is None else f"--max-gpu-memory {memory_bytes / _GIB:.4g}GiB"
        # A given --max-gpu-memory is part of the run.
        planned = asked if fit_bytes is None or fitted is None else fitted
        fits.append(fit_facts("training", costs.memory(planned).needed_bytes, memory_bytes, fix))
    facts |= {"gpu": gpu_facts(gpu, rate, 1), "fits": fits, "verdicts": verdicts}
    return facts


def _manifests(
    asked: "TrainSettings",
    stated: Mapping[str, str],
    given: Sequence[str],
    teacher: str | None,
    resolutions: Sequence[str],
    stored: StoredAs,
    builds: Mapping[str, PlannedBuild],
) -> tuple[dict[str, "Manifest"], str]:
    """The existing and planned caches of the run by name, and the source of their configuration files."""
    there = named_places(given)
    if teacher is None:
        there = {**stated, **there}
    named = list(dict.fromkeys(name for stage in asked.stages for name in stage.caches or ()))
    if teacher is not None and not named:
        named = list(stated)
    to_come = [name for name in named if name not in there]
    if not there and not named:
        to_come = [_ONLY]
    if to_come and teacher is None:
        if not named:
            raise SettingsError("plan train needs one of --cache (an existing cache) and --teacher (for a planned one)")
        raise SettingsError(
            f"the recipe uses the cache {to_come[0]!r}, which is not given: give --cache {to_come[0]}=FOLDER, or "
            f"--teacher for a planned one"
        )
    if teacher is not None and not to_come:
        raise SettingsError(
            f"--teacher is {teacher}, but all caches of the run are given, {', '.join(there)}: plan train needs "
            f"--cache (an existing cache) or --teacher (for a planned one)"
        )
    pixels = _pixels(resolutions, to_come)
    quiet_imports()
    manifests = {name: _recorded(place) for name, place in there.items()}
    configs = f"the manifest of {', '.join(there.values())}" if there else ""
    for name in to_come:
        build = builds.get(name) or PlannedBuild(resolution=pixels.get(name), **stored.given)
        manifests[name], _, found = outline(str(teacher), 1, build)
        configs = configs or found
    asked.check_names(list(manifests))
    return manifests, configs


def _pixels(given: Sequence[str], to_come: Sequence[str]) -> dict[str, int]:
    pixels: dict[str, int] = {}
    for text in sorted(given, key=lambda text: "=" in text):
        name, _, number = text.rpartition("=")
        if not number.isdecimal():
            raise SettingsError(f"--resolution is {text!r}, expected pixels, or NAME=PIXELS for one planned cache")
        if name and name not in to_come:
            known = ", ".join(to_come) or "none"
            raise SettingsError(f"--resolution {text} names the cache {name!r}, expected a planned one: {known}")
        pixels |= dict.fromkeys([name] if name else to_come, int(number))
    return pixels


def _recorded(place: str) -> "Manifest":
    from secondcast.storage_schemas.io.folders import open_folder
    from secondcast.storage_schemas.reader import read_manifest

    return read_manifest(open_folder(place))


def print_train(facts: dict[str, Any]) -> None:
    """Print a plan of a run."""
    from secondcast.commands.plan.train_rows import AS_ASKED, FITTED

    way = FITTED if FITTED in facts["ways"] else AS_ASKED
    stages = facts["ways"][way]["stages"]
    stage_texts = [
        f"{_steps_text(stage, facts['training'])} of the {stage['loss']} loss at batch {stage['batch_size']}"
        for stage in stages
    ]
    print_facts({
        "teacher": f"{facts['teacher']['source']}; {facts['teacher']['configs']}",
        "student": f"{facts['student']['source']}, {count_text(facts['student']['parameters'])} parameters with its "
        f"projection; {', then '.join(stage_texts)}",
    })  # fmt: skip
    _print_stages(facts, way)
    table = figure_table("", *(_WAYS[name] for name in facts["ways"]))
    ways = list(facts["ways"].values())
    rows = (
        ("GPU memory, GiB (calculated)", [f"{one['gpu_memory']['total_bytes'] / _GIB:.1f}" for one in ways]),
        ("  weights", [f"{one['gpu_memory']['weights_bytes'] / _GIB:.1f}" for one in ways]),
        ("  student and AdamW", [f"{one['gpu_memory']['student_bytes'] / _GIB:.1f}" for one in ways]),
        ("  activations", [f"{one['gpu_memory']['activations_bytes'] / _GIB:.1f}" for one in ways]),
        ("host memory, GiB (calculated)", [f"{one['host_memory_bytes'] / _GIB:.1f}" for one in ways]),
        ("  pinned, for streamed blocks", [f"{one['pinned_bytes'] / _GIB:.1f}" for one in ways]),
        ("TFLOP per sample of the vision loss", [number_text(one["flop_per_sample"], ".1f", 1e12) for one in ways]),
        ("hours of all stages", [hours_text(one["hours"]) for one in ways]),
        ("hours of the paper's 320,000 steps of 32", [_with_days(one["paper_recipe_hours"]) for one in ways]),
        ("cache data used, MB/s", [number_text(one["used_bytes_per_second"], ".1f", 1e6) for one in ways]),
        (
            "cache data read without reuse, MB/s",
            [number_text(one["read_bytes_per_second"], ".1f", 1e6) for one in ways],
        ),
    )
    for name, values in rows:
        table.add_row(name, *values)
    print_figures(table)
    print_gpu(facts)


def _print_stages(facts: dict[str, Any], way: str) -> None:
    from secondcast.commands.plan.train_rows import FITTED

    title = "with the options that fit" if way == FITTED else None
    table = figure_table("stage", "loss", "px", "steps", "batch", "TFLOP/step", "s/step", "hours", title=title)
    for stage in facts["ways"][way]["stages"]:
        divided = f" in {stage['grad_accum_steps']}" if stage["grad_accum_steps"] > 1 else ""
        tflop, steps = stage["flop_per_step"] / 1e12, stage["steps"]
        table.add_row(
            stage["name"], stage["loss"], _sizes(stage["caches"].values()),
            "-" if steps is None else f"{steps:,}", f"{stage['batch_size']}{divided}",
            f"{tflop:,.0f}" if tflop >= 100 else f"{tflop:.3g}", number_text(stage["seconds_per_step"], ".3g"),
            hours_text(stage["hours"]),
        )  # fmt: skip
    print_figures(table)
    time_budget = facts["training"]["budget_hours"]
    if time_budget is not None:
        print_wrapped(
            f"the steps of stages that share the budget of {duration_text(3600 * time_budget)} are estimates: train "
            f"measures the time of a step",
        )
    if any(not LOSSES[stage["loss"]].replays for stage in facts["ways"][way]["stages"]):
        print_wrapped(
            "steps without the transformer take longer than estimated: they are too small for the GPU's full rate"
        )


def _sizes(heights: Iterable[int | None]) -> str:
    return ", ".join(map(str, sorted({height for height in heights if height is not None}))) or "-"


def _steps_text(stage: dict[str, Any], training: dict[str, Any]) -> str:
    if stage["budget_share"] is None:
        return counted(stage["steps"], "step")
    part = f"{stage['budget_share'] * 100:g} % of {duration_text(3600 * training['budget_hours'])}"
    return part if stage["steps"] is None else f"{part}, about {counted(stage['steps'], 'step')},"


def _with_days(hours: float | None) -> str:
    return hours_text(hours) if hours is None or hours < 48 else f"{hours_text(hours)} ({hours / 24:,.0f} days)"
