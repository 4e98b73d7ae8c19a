"""`secondcast plan build`: estimate disk space, hours and memory of a build."""

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.cache_builder.settings import PlannedBuild
from secondcast.commands.plan.cards import (
    Gpu,
    GpuChoice,
    Tflops,
    count_text,
    figure_table,
    fit_facts,
    gpu_facts,
    hours_text,
    outline,
    print_figures,
    print_gpu,
    rate_of,
)
from secondcast.commands.shell.config_file import Config
from secondcast.commands.shell.console import PlainTable, print_facts, print_json, print_line
from secondcast.commands.shell.resolve import Json, teacher_names
from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.progress import counted

if TYPE_CHECKING:
    from secondcast.models.cost.cards import Card
    from secondcast.models.teacher.folder import TeacherFolder
    from secondcast.storage_schemas.schema.manifest import Manifest

_GIB = 2**30
Teacher = Annotated[
    str,
    typer.Option(
        autocompletion=teacher_names,
        help="Teacher: pocket, a model such as FLUX.1-dev, or a folder with the configuration files.",
    ),
]
Count = Annotated[int | None, typer.Option(min=1, help="Number of prompts, instead of --prompts.")]


def plan_build(
    teacher: Teacher,
    asked: PlannedBuild,
    num_prompts: Count = None,
    gpu: Gpu = None,
    tflops: Tflops = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    disk: Annotated[
        str | None, typer.Option(help="Folder on the disk of the planned cache; its free space is checked.")
    ] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Estimate the cost of a build. Needs configuration files only; loads and downloads no weights.

    Example: secondcast plan build --teacher FLUX.1-dev --num-prompts 50000 --gpu h100
    """
    facts = build_plan(teacher, asked, num_prompts, GpuChoice(name=gpu, tflops=tflops), gpus=gpus, disk=disk)
    if as_json:
        print_json(facts)
    else:
        print_build(facts)


def build_plan(
    teacher: str,
    asked: PlannedBuild,
    num_prompts: int | None,
    gpu: GpuChoice,
    *,
    gpus: int = 1,
    disk: str | None = None,
) -> dict[str, Any]:
    """The estimated cost of a build, as JSON types; arguments: see plan_build."""
    if disk is not None and not Path(disk).exists():
        raise SettingsError(
            f"--disk {disk} does not exist: expected an existing folder on the disk of the planned cache"
        )
    card = gpu.card()
    manifest, folder, configs = outline(teacher, num_prompts, asked)
    rate = rate_of(gpu, manifest)
    from secondcast.commands.plan.build_rows import build_facts

    facts = build_facts(manifest, folder, batch_size=asked.batch_size, rate_flops=rate.flops_per_s, gpus=gpus)
    fits: list[dict[str, Any]] = []
    verdicts: list[str] = []
    if card is not None:
        fits, verdicts = _memory_fits(manifest, folder, card, facts["gpu_memory"])
    if disk is not None:
        from secondcast.cache_builder.opening.disk import free_disk

        folder_there, free_bytes = free_disk(disk)
        fits.append(fit_facts("cache on disk", facts["disk"]["stored_high_bytes"], free_bytes))
        verdicts.append(_disk_verdict(folder_there, free_bytes, facts["disk"]))
    facts = {"teacher": {"source": folder.source, "configs": configs}, **facts}
    facts |= {"gpu": gpu_facts(gpu, rate, gpus), "fits": fits, "verdicts": verdicts}
    return facts


_CPU_STAGE = "--stage text --device cpu"


def _memory_fits(
    manifest: "Manifest", folder: "TeacherFolder", card: "Card", gpu_memory: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Whether each stage fits on a GPU, with the option that makes it fit; as JSON types and as lines."""
    from secondcast.commands.plan.build_rows import gpu_memory_of, gpu_verdict

    fits, verdicts, card_bytes = [], [], card.memory_gib * _GIB
    for name, facts in gpu_memory.items():
        stage, rows = name.replace("_", " "), gpu_memory_of(facts).largest_batch(card_bytes)
        fix: str | None = _CPU_STAGE
        larger = f"use a larger GPU, or a CPU for this stage ({_CPU_STAGE})"
        if rows >= 1:
            fix = f"--batch-size {rows}"
        elif name == "sample_stage":
            fix, larger = _smaller_way(manifest, folder, card, facts["batch_size"])
        fits.append(fit_facts(stage, facts["needed_bytes"], card_bytes, fix))
        verdicts.append(gpu_verdict(stage, facts, card, larger=larger))
    return fits, verdicts


def _smaller_way(
    manifest: "Manifest", folder: "TeacherFolder", card: "Card", batch_size: int
) -> tuple[str | None, str]:
    """The fix where all weights on the GPU do not fit: an exact placement, or quantized weights, if they fit.

    Its option (None if nothing fits), and a line about it.
    """
    from secondcast.cache_builder.settings import placed
    from secondcast.commands.plan.build_rows import LARGER_CARD, build_facts, gpu_memory_of
    from secondcast.models.cost.placement import place, sample_stage_cost
    from secondcast.models.memory.options import SamplingMemory

    with contextlib.suppress(SettingsError):
        found = place(
            sample_stage_cost(manifest, batch_size),
            placed(SamplingMemory(), manifest.sampling.quantize, manifest.teacher.pooled),
            memory_bytes=card.memory_gib * _GIB,
            host_bytes=None,
        )
        exact = " with the exact weights" if manifest.sampling.quantize == "none" else ""
        option = f"--max-gpu-memory {card.memory_gib:g}GiB"
        return option, f"{option} fits{exact}: {found.flags}"
    for kind in ("int8", "nf4"):
        sampling = manifest.sampling.model_copy(update={"quantize": kind})
        quantized = manifest.model_copy(update={"sampling_or_none": sampling})
        facts = build_facts(quantized, folder, batch_size=batch_size, rate_flops=None, gpus=1)
        memory = gpu_memory_of(facts["gpu_memory"]["sample_stage"])
        if (rows := memory.largest_batch(card.memory_gib * _GIB)) >= 1:
            needed = replace(memory, batch_size=1).total_bytes / _GIB
            fewer = "" if rows >= batch_size else f" --batch-size {rows}"
            return f"--quantize {kind}{fewer}", (
                f"{LARGER_CARD}, or --quantize {kind} ({needed:.1f} GiB at batch 1, up to batch {rows}): then train "
                f"with the same value, because quantization changes the teacher"
            )
    return None, LARGER_CARD


def _disk_verdict(folder: Any, free: float, facts: dict[str, Any]) -> str:
    low, high = facts["stored_low_bytes"] / _GIB, facts["stored_high_bytes"] / _GIB
    room = f"{low:,.1f} to {high:,.1f} GiB (estimated), the disk of {folder} has {free / _GIB:,.1f} GiB free"
    if high * _GIB <= free:
        return f"fits: the cache, {room}"
    return f"does not fit: the cache, {room}; give a smaller --limit, another --compression or another disk"


def print_build(facts: dict[str, Any]) -> None:
    """Print a plan of a build."""
    compute = facts["compute"]
    print_facts({
        "teacher": f"{facts['teacher']['source']}; {facts['teacher']['configs']}",
        "cache": _cache_text(facts["cache"]),
        "parameters": ", ".join(f"{name.replace('_', ' ')} {count_text(n)}" for name, n in facts["parameters"].items()),
    })  # fmt: skip
    print_figures(_array_table(facts))
    table = figure_table(
        "stage", "TFLOP\nper row", "hours", "weights\nGiB", "activations\nGiB", "total GiB,\ncalculated"
    )  # fmt: skip
    for stage, each in (("text", "text_flop_per_prompt"), ("sample", "sample_flop_per_trajectory")):
        if (memory := facts["gpu_memory"].get(f"{stage}_stage")) is None:
            continue
        table.add_row(
            f"{stage}, batch {memory['batch_size']}", f"{compute[each] / 1e12:,.2f}",
            hours_text(compute[f"{stage}_hours"]), f"{memory['weights_bytes'] / _GIB:.2f}",
            f"{memory['activations_bytes'] / _GIB:.2f}", f"{memory['total_bytes'] / _GIB:.2f}",
        )  # fmt: skip
    print_figures(table)
    print_line(f"host memory: {facts['host_memory_bytes'] / _GIB:.1f} GiB (calculated)")
    if compute.get("write_bytes_per_second") is not None:
        print_line(f"writing: {compute['write_bytes_per_second'] / 1e6:.2f} MB/s raw")
    print_gpu(facts)


def _cache_text(cache: dict[str, Any]) -> str:
    prompts, shards = counted(cache["prompts"], "prompt"), counted(cache["shards"], "shard")
    text = (
        f"{counted(cache['text_tokens'], 'text token')}, {cache['dtype']}, {cache['format']}, compression "
        f"{cache['compression']}"
    )
    if not cache["trajectories"]:
        return f"{prompts} in {shards}, no trajectories, {text}"
    return (
        f"{prompts}, {counted(cache['trajectories'], 'trajectory')} of {counted(cache['steps'], 'step')} in {shards}, "
        f"{cache['width_px']} x {cache['height_px']} px, {text}, latents {cache['latents']}"
    )


def _array_table(facts: dict[str, Any]) -> PlainTable:
    table, disk = figure_table("array", "rows", "KiB per row", "raw GiB", "on disk GiB, estimated"), facts["disk"]
    for size in facts["arrays"]:
        table.add_row(
            size["name"], f"{size['rows']:,}", f"{size['row_bytes'] / 1024:,.1f}", f"{size['raw_bytes'] / _GIB:,.2f}",
            _range(size["stored_low_bytes"], size["stored_high_bytes"]), end_section=size is facts["arrays"][-1],
        )  # fmt: skip
    table.add_row("total", "", "", f"{disk['raw_bytes'] / _GIB:,.2f}",
                  _range(disk["stored_low_bytes"], disk["stored_high_bytes"]), style="bold")  # fmt: skip
    return table


def _range(low: float, high: float) -> str:
    return f"{low / _GIB:,.2f}" if low == high else f"{low / _GIB:,.2f} to {high / _GIB:,.2f}"
