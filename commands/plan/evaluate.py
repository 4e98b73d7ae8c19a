"""`secondcast plan evaluate`: estimate memory and hours of an evaluation on a cache."""

from typing import Any

from secondcast.cache_builder.settings import PlannedBuild
from secondcast.commands.evaluate.cache import NumTrajectories
from secondcast.commands.plan.build import Teacher
from secondcast.commands.plan.build_rows import hours_of, memory_facts
from secondcast.commands.plan.cards import (
    Gpu,
    GpuChoice,
    Tflops,
    count_text,
    fit_facts,
    gpu_facts,
    hours_text,
    outline,
    print_gpu,
    rate_of,
)
from secondcast.commands.plan.sampling import PlannedStudent, print_sampling, sampling_verdict
from secondcast.commands.shell.config_file import Config
from secondcast.commands.shell.console import print_facts, print_json
from secondcast.commands.shell.resolve import Json, student_source
from secondcast.evaluation.settings.cache_scoring import TRAJECTORIES, CacheScoring, CacheScoringOptions
from secondcast.models.teacher.pipeline_inputs import ImageSize
from secondcast.storage_schemas.progress import counted

_GIB = 2**30


def plan_evaluate(
    teacher: Teacher,
    student: PlannedStudent = None,
    size: ImageSize = ImageSize(),
    num_trajectories: NumTrajectories = TRAJECTORIES,
    options: CacheScoringOptions = CacheScoringOptions(),
    gpu: Gpu = None,
    tflops: Tflops = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Estimate GPU memory and hours of `secondcast evaluate score --cache`. Loads and downloads no weights.

    Example: secondcast plan evaluate --teacher FLUX.1-dev --resolution 512 --gpu 4090
    """
    settings = CacheScoring(num_trajectories=num_trajectories, **options.given)
    facts = evaluate_plan(teacher, student, size, settings, GpuChoice(name=gpu, tflops=tflops))
    if as_json:
        print_json(facts)
    else:
        _print_evaluate(facts)


def evaluate_plan(
    teacher: str, student: str | None, size: ImageSize, settings: CacheScoring, gpu: GpuChoice
) -> dict[str, Any]:
    """The estimated cost of an evaluation, as JSON types; arguments: see plan_evaluate."""
    card, limit = gpu.card(), gpu.limit_bytes(settings.max_gpu_memory)
    there = card.memory_gib * _GIB if card is not None and limit is None else limit
    manifest, folder, configs = outline(teacher, 1, PlannedBuild(**size.given))
    student = student or folder.family.student
    from secondcast.evaluation.settings.memory import scoring_cost
    from secondcast.models.cost.counted import student_cost

    parameters = student_cost(student_source(student), manifest).parameters
    cost = scoring_cost(manifest, folder, settings, student_parameters=parameters)
    options, rate = settings.memory_of(manifest), rate_of(gpu, manifest, settings.dtype_of(manifest))
    steps = manifest.sampling.steps if settings.timesteps is None else len(settings.timesteps)
    # The student's predictions and those of the recorded embeddings; then images of both, and of an untrained student.
    open_calls = 2 * settings.num_trajectories * steps
    sampled = min(settings.closed_loop, settings.num_trajectories)
    closed_calls = (3 if settings.random_baseline else 2) * sampled * manifest.sampling.steps
    rows = open_calls + closed_calls * manifest.sampling.rows_per_call
    flops, memory = rows * cost.backbone.forward_flops, cost.memory(options)
    return {
        "teacher": {"source": folder.source, "configs": configs},
        "student": {"source": student, "parameters": parameters},
        "evaluation": {
            "height_px": manifest.sampling.height,
            "width_px": manifest.sampling.width,
            "trajectories": settings.num_trajectories,
            "timesteps": steps,
            "closed_loop": sampled,
        },
        "compute": {
            "open_loop_calls": open_calls,
            "closed_loop_calls": closed_calls,
            "flop": flops,
            "hours": hours_of(flops, rate.flops_per_s, 1),
        },
        "gpu_memory": memory_facts(memory),
        "gpu": gpu_facts(gpu, rate, 1),
        "fits": [] if there is None else [fit_facts("evaluation", memory.needed_bytes, there)],
        "verdicts": []
        if there is None
        else [sampling_verdict("evaluation", cost, options, card=card if limit is None else None, memory_bytes=there)],
    }


def _print_evaluate(facts: dict[str, Any]) -> None:
    asked, compute = facts["evaluation"], facts["compute"]
    print_facts({
        "teacher": f"{facts['teacher']['source']}; {facts['teacher']['configs']}",
        "student": f"{facts['student']['source']}, {count_text(facts['student']['parameters'])} parameters in float32",
        "evaluation": f"{counted(asked['trajectories'], 'trajectory')} of "
        f"{asked['width_px']} x {asked['height_px']} px at {counted(asked['timesteps'], 'step')}; "
        f"{asked['closed_loop']} of them sampled again",
    })  # fmt: skip
    columns = {"PFLOP": f"{compute['flop'] / 1e15:,.1f}", "hours": hours_text(compute["hours"])}
    print_sampling(columns, facts["gpu_memory"])
    print_gpu(facts)
