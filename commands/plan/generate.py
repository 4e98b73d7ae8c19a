"""`secondcast plan generate`: estimate memory and seconds of sampling with a student."""

from typing import Any

from secondcast.cache_builder.settings import PlannedBuild
from secondcast.commands.generate import IMAGES_AT_ONCE, ImageBatch
from secondcast.commands.plan.build import Teacher
from secondcast.commands.plan.build_rows import memory_facts
from secondcast.commands.plan.cards import (
    Gpu,
    GpuChoice,
    Tflops,
    count_text,
    fit_facts,
    gpu_facts,
    outline,
    print_gpu,
    rate_of,
)
from secondcast.commands.plan.sampling import PlannedStudent, print_sampling, sampling_verdict
from secondcast.commands.shell.config_file import Config
from secondcast.commands.shell.console import print_facts, print_json
from secondcast.commands.shell.resolve import Json, student_source
from secondcast.evaluation.settings.generating import PictureOptions
from secondcast.models.memory.options import SamplingMemory
from secondcast.storage_schemas.progress import counted

_GIB = 2**30


def plan_generate(
    teacher: Teacher,
    student: PlannedStudent = None,
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
    facts = generate_plan(teacher, student, asked, batch_size, GpuChoice(name=gpu, tflops=tflops))
    if as_json:
        print_json(facts)
    else:
        _print_generate(facts)


def generate_plan(
    teacher: str, student: str | None, asked: PictureOptions, batch_size: int, gpu: GpuChoice
) -> dict[str, Any]:
    """The estimated cost of sampling, as JSON types; arguments: see plan_generate."""
    card = gpu.card()
    shape = {name: getattr(asked, name) for name in ("resolution", "height", "width", "text_length", "dtype")}
    manifest, folder, configs = outline(teacher, 1, PlannedBuild(**shape))
    student = student or folder.family.student
    from secondcast.evaluation.pictures.folder import PictureSettings
    from secondcast.evaluation.settings.memory import sampling_cost, sampling_options
    from secondcast.models.cost.counted import student_cost

    sampling = manifest.sampling
    settings = PictureSettings(
        student=student, teacher=folder.source, text_length=manifest.teacher.text_length, height=sampling.height,
        width=sampling.width, steps=asked.steps, schedule="diffusers",
        guidance=None if sampling.guidance is None else asked.guidance, seed=asked.seed, dtype=asked.dtype,
        pooled=folder.family.pooled_choice(asked.pooled), quantize=asked.quantize,
    )  # fmt: skip
    parameters = student_cost(student_source(student), manifest).parameters
    cost = sampling_cost(settings, folder, batch_size=batch_size, student_parameters=parameters)
    options = sampling_options(SamplingMemory(), settings)
    flops, rate = asked.steps * cost.rows_per_call * cost.backbone.forward_flops, rate_of(gpu, manifest)
    seconds = None if rate.flops_per_s is None else flops / rate.flops_per_s
    memory = cost.memory(options)
    return {
        "teacher": {"source": folder.source, "configs": configs},
        "student": {"source": student, "parameters": parameters},
        "images": {
            **{key: value for key, value in settings.json_value().items() if key not in ("student", "teacher")},
            "samples_per_prompt": asked.samples_per_prompt,
        },
        "compute": {
            "flop_per_image": flops,
            "seconds_per_image": seconds,
            "seconds_per_prompt": None if seconds is None else asked.samples_per_prompt * seconds,
        },
        "gpu_memory": memory_facts(memory),
        "gpu": gpu_facts(gpu, rate, 1),
        "fits": [] if card is None else [fit_facts("sampling", memory.needed_bytes, card.memory_gib * _GIB)],
        "verdicts": []
        if card is None
        else [sampling_verdict("sampling", cost, options, card=card, memory_bytes=card.memory_gib * _GIB)],
    }


def _print_generate(facts: dict[str, Any]) -> None:
    images, memory, compute = facts["images"], facts["gpu_memory"], facts["compute"]
    print_facts({
        "teacher": f"{facts['teacher']['source']}; {facts['teacher']['configs']}",
        "student": f"{facts['student']['source']}, {count_text(facts['student']['parameters'])} parameters in float32",
        "images": f"{images['width']} x {images['height']} px, {counted(images['steps'], 'step')}, "
        f"{counted(images['text_length'], 'text token')}, {images['dtype']}",
    })  # fmt: skip
    seconds = compute["seconds_per_image"]
    columns = {
        "TFLOP per image": f"{compute['flop_per_image'] / 1e12:,.1f}",
        "s per image": "unknown" if seconds is None else f"{seconds:,.1f}",
    }
    if images["samples_per_prompt"] > 1 and seconds is not None:
        columns[f"s per prompt ({counted(images['samples_per_prompt'], 'image')})"] = (
            f"{compute['seconds_per_prompt']:,.1f}"
        )
    print_sampling(columns, memory)
    print_gpu(facts)
