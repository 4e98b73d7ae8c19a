"""`secondcast plan generate`: estimate memory and seconds of sampling with a student."""

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.cache_builder.settings import PlannedBuild
from secondcast.commands.generate import IMAGES_AT_ONCE, ImageBatch
from secondcast.commands.plan.build import Teacher
from secondcast.commands.plan.build_rows import LARGER_CARD, memory_facts, needed_text
from secondcast.commands.plan.cards import (
    Gpu,
    Tflops,
    count_text,
    figure_table,
    fit_facts,
    gpu_facts,
    named_card,
    outline,
    print_facts,
    print_gpu,
    rate_of,
)
from secondcast.commands.shell.config_file import Config
from secondcast.commands.shell.console import print_json, print_table
from secondcast.commands.shell.resolve import Json, student_source
from secondcast.evaluation.settings.generating import PictureOptions
from secondcast.models.memory.options import MemoryOptions, SamplingMemory
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted

if TYPE_CHECKING:
    from secondcast.models.cost.cards import Card
    from secondcast.models.cost.placement import SamplingCost

_GIB = 2**30


def plan_generate(
    teacher: Teacher,
    student: Annotated[str, typer.Option(help="Student: small, base, large or xl, or a T5 folder.")] = "base",
    asked: PictureOptions = PictureOptions(),
    batch_size: ImageBatch = IMAGES_AT_ONCE,
    gpu: Gpu = None,
    tflops: Tflops = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Estimate GPU memory and seconds of `secondcast generate` with a student. Loads and downloads no weights.

    Example: secondcast plan generate --teacher FLUX.1-dev --resolution 1024 --batch-size 1 --gpu 4070
    """
    facts = generate_plan(teacher, student, asked, batch_size, gpu, tflops)
    if as_json:
        print_json(facts)
    else:
        _print_generate(facts)


def generate_plan(
    teacher: str, student: str, asked: PictureOptions, batch_size: int, gpu: str | None, tflops: float | None
) -> dict[str, Any]:
    """The estimated cost of sampling, as JSON types; arguments: see plan_generate."""
    card = named_card(gpu, tflops)
    shape = {name: getattr(asked, name) for name in ("resolution", "height", "width", "text_length", "dtype")}
    manifest, folder, configs = outline(teacher, 1, PlannedBuild(**shape))
    from secondcast.evaluation.generate import sampling_options
    from secondcast.evaluation.pictures.folder import PictureSettings
    from secondcast.evaluation.sampling import sampling_cost
    from secondcast.models.cost.text import student_cost

    sampling = manifest.sampling
    settings = PictureSettings(
        student=student, teacher=folder.source, text_length=manifest.teacher.text_length, height=sampling.height,
        width=sampling.width, steps=asked.steps, schedule="diffusers",
        guidance=None if sampling.guidance is None else asked.guidance, seed=asked.seed, dtype=asked.dtype,
        pooled=asked.pooled, quantize=asked.quantize,
    )  # fmt: skip
    parameters = student_cost(student_source(student), manifest).parameters
    cost = sampling_cost(settings, folder, batch_size=batch_size, student_parameters=parameters)
    options = sampling_options(SamplingMemory(), settings)
    flops, rate = asked.steps * cost.backbone.forward_flops, rate_of(card, tflops, manifest)
    memory = cost.memory(options)
    return {
        "teacher": {"source": folder.source, "configs": configs},
        "student": {"source": student, "parameters": parameters},
        "images": {key: value for key, value in settings.json_value().items() if key not in ("student", "teacher")},
        "compute": {
            "flop_per_image": flops,
            "seconds_per_image": None if rate.flops_per_s is None else flops / rate.flops_per_s,
        },
        "gpu_memory": memory_facts(memory),
        "gpu": gpu_facts(card, rate, 1),
        "fits": [] if card is None else [fit_facts("sampling", memory.needed_bytes, card.memory_gib * _GIB)],
        "verdicts": [] if card is None else [_verdict(cost, options, card)],
    }


def _verdict(cost: "SamplingCost", options: MemoryOptions, card: "Card") -> str:
    from secondcast.models.cost.placement import place

    needed = needed_text(cost.memory(options))
    stated = f"sampling: {needed} at batch {cost.batch_size}, {card.name} has {card.memory_gib:.1f} GiB"
    memory_bytes = card.memory_gib * _GIB
    with contextlib.suppress(SettingsError):
        found = place(cost, options, memory_bytes=memory_bytes, host_bytes=None)
        if found.memory == cost.memory(options):
            return f"fits: {stated}"
        return f"does not fit: {stated}; --max-gpu-memory {card.memory_gib:g}GiB fits: {found.flags}"
    return f"does not fit: {stated}: give a smaller --batch-size, smaller images, --quantize nf4, or {LARGER_CARD[4:]}"


def _print_generate(facts: dict[str, Any]) -> None:
    images, memory, compute = facts["images"], facts["gpu_memory"], facts["compute"]
    print_facts({
        "teacher": f"{facts['teacher']['source']}; {facts['teacher']['configs']}",
        "student": f"{facts['student']['source']}, {count_text(facts['student']['parameters'])} parameters in float32",
        "images": f"{images['width']} x {images['height']} px, {counted(images['steps'], 'step')}, "
        f"{counted(images['text_length'], 'text token')}, {images['dtype']}",
    })  # fmt: skip
    head = ("TFLOP per image", "s per image", "weights GiB", "activations GiB", "total GiB, calculated")
    table = figure_table("", *head)
    seconds = compute["seconds_per_image"]
    table.add_row(
        f"batch {memory['batch_size']}", f"{compute['flop_per_image'] / 1e12:,.1f}",
        "unknown" if seconds is None else f"{seconds:,.1f}", f"{memory['weights_bytes'] / _GIB:.2f}",
        f"{memory['activations_bytes'] / _GIB:.2f}", f"{memory['total_bytes'] / _GIB:.2f}",
    )  # fmt: skip
    print_table(table)
    print_gpu(facts)
