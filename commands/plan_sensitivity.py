"""`understudy plan sensitivity`: what measuring takes."""

import json
from typing import Annotated, Any

import typer

from commands.plan_cards import (
    Gpu,
    Tflops,
    figure_table,
    fit_facts,
    gpu_facts,
    hours_text,
    named_card,
    outline,
    print_facts,
    print_gpu,
    rate_of,
)
from commands.resolve import Json, TeacherName, print_table
from storage_schemas.errors import BadSettings

_GIB = 2**30


def plan_sensitivity(
    teacher: TeacherName,
    products: Annotated[int, typer.Option(min=1, help="Vector-Jacobian products per prompt.")] = 4,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 1024,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each trajectory; default: all.")] = None,
    trajectory_steps: Annotated[int, typer.Option(min=1, help="Sampler steps of the cache.")] = 20,
    resolution: Annotated[int | None, typer.Option(help="Pixels per side; default 512, or the teacher's own.")] = None,
    text_length: Annotated[int | None, typer.Option(help="T5 tokens; default 77, or the teacher's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="As for sensitivity.")] = 8,
    checkpoint_blocks: Annotated[int, typer.Option(min=0, help="As for sensitivity.")] = 0,
    resident_blocks: Annotated[int | None, typer.Option(min=0, help="As for sensitivity.")] = None,
    gpu: Gpu = None,
    tflops: Tflops = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of such cards.")] = 1,
    as_json: Json = False,
) -> None:
    """What measuring the sensitivity of a cache will take. Loads and downloads nothing.

    Example: understudy plan sensitivity --teacher FLUX.1-dev --prompts 256 --checkpoint-blocks 1 --gpu h100
    """
    flags: dict[str, Any] = {"steps": trajectory_steps, "resolution": resolution, "text_length": text_length}
    card = named_card(gpu, tflops)
    manifest, folder, configs = outline(teacher, prompts, flags)
    from cache_builder.sensitivity_plan import SensitivitySettings
    from commands.planning import gpu_verdict
    from commands.planning_sensitivity import sensitivity_facts

    asked = SensitivitySettings.from_flags(
        products=products, prompts=prompts, steps=steps, batch_size=batch_size, checkpoint_blocks=checkpoint_blocks,
        resident_blocks=resident_blocks,
    )  # fmt: skip
    if asked.steps is not None and asked.steps > trajectory_steps:
        raise BadSettings(
            f"--steps is {asked.steps}, the trajectories have {trajectory_steps} (--trajectory-steps): give at most "
            f"{trajectory_steps}"
        )
    rate = rate_of(card, tflops, manifest.sampling.dtype)
    facts = sensitivity_facts(manifest, asked, rate_flops=rate, gpus=gpus)
    memory, verdicts, fits = facts["gpu_memory"], [], []
    if card is not None:
        larger = "give --checkpoint-blocks 1, --resident-blocks, a smaller --batch-size"
        verdicts.append(gpu_verdict("products", memory, card, larger=larger))
        fits.append(fit_facts("products", memory["total_bytes"], card.memory_gib * _GIB))
    facts = {"teacher": {"source": folder.source, "configs": configs}, **facts}
    facts |= {"gpu": gpu_facts(card, rate, gpus), "fits": fits, "verdicts": verdicts}
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    print_facts({
        "teacher": f"{folder.source}; {configs}",
        "measured": f"{facts['prompts']:,} prompts x {facts['products']} products x {facts['steps']} steps",
        "on disk": f"{facts['parts']} parts of {_mb_text(facts['parts_bytes'] / facts['parts'])} while it is "
        f"measured, {_mb_text(facts['kept_bytes'])} in the end",
    })  # fmt: skip
    table = figure_table("", "TFLOP per prompt", "hours", "activations GiB", "all GiB, calculated")
    table.add_row(
        f"products, batch {memory['batch_size']}", f"{facts['flop_per_prompt'] / 1e12:,.2f}",
        hours_text(facts["hours"]), f"{memory['activations_bytes'] / _GIB:.2f}",
        f"{memory['total_bytes'] / _GIB:.2f}",
    )  # fmt: skip
    print_table(table)
    print_gpu(facts)


def _mb_text(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.0f} MB" if size_bytes >= 1e7 else f"{size_bytes / 1e6:.2g} MB"
