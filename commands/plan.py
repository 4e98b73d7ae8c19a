"""`understudy plan build` and `understudy plan train`: bytes, hours and memory before they are spent."""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from commands.resolve import POCKET, Json, Settings, out, quiet_device, resolve_teacher, student_source
from storage_schemas.errors import BadSettings

if TYPE_CHECKING:
    from models.cards import Card
    from models.teacher_folder import TeacherFolder
    from storage_schemas.manifest import Manifest

plan_app = typer.Typer(no_args_is_help=True, help="Bytes, hours and memory, before they are spent.")

_GIB = 2**30
Gpu = Annotated[str | None, typer.Option(help="A card by name, such as 4090 or h100.")]
Tflops = Annotated[float | None, typer.Option(help="TFLOP/s that are reached, in place of the estimate.")]
Teacher = Annotated[str, typer.Option(help="pocket, a folder with the configurations, FLUX.1-dev, FLUX.1-schnell.")]
Count = Annotated[int | None, typer.Option(min=1, help="Number of prompts, in place of --prompts.")]


@plan_app.command("build")
def plan_build(
    teacher: Teacher,
    prompts: Annotated[list[str] | None, typer.Option(metavar="SOURCE", help="As for build.")] = None,
    count: Count = None,
    limit: Annotated[int | None, typer.Option(help="Only the first that many distinct prompts.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels per side; default 512, or the teacher's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; with --width, in place of --resolution.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; with --height.")] = None,
    text_length: Annotated[int | None, typer.Option(help="T5 tokens; default 77, or the teacher's own.")] = None,
    pooled: Literal["zero", "clip"] = "zero",
    schedule: Literal["pipeline", "reference"] = "pipeline",
    steps: Annotated[int, typer.Option(help="Sampler steps per trajectory.")] = 20,
    replicas: Annotated[int, typer.Option(help="Trajectories per prompt.")] = 1,
    guidance: Annotated[str, typer.Option(help="One value, a list, or first:last:step.")] = "2.0:5.0:0.5",
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    batch_size: int = 16,
    shard_size: Annotated[int, typer.Option(help="Trajectories per shard.")] = 64,
    format: Literal["zarr", "webdataset"] = "zarr",
    codec: Literal["plain", "compact", "int8"] = "compact",
    latents: Literal["derived", "stored"] = "derived",
    embeddings: Literal["stored", "none"] = "stored",
    gpu: Gpu = None,
    tflops: Tflops = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of such cards.")] = 1,
    disk: Annotated[str | None, typer.Option(help="Where the cache shall lie: is there room?")] = None,
    as_json: Json = False,
    settings: Settings = None,
) -> None:
    """What a build will take. Needs configuration files only; loads and downloads nothing.

    Example: understudy plan build --teacher FLUX.1-dev --count 50000 --gpu h100
    """
    from cache_builder.settings import guidance_values

    flags = dict(
        prompts=tuple(prompts or ()), limit=limit, resolution=resolution, steps=steps, replicas=replicas,
        guidance=guidance_values(guidance), seed=seed, dtype=dtype, batch_size=batch_size, shard_size=shard_size,
        format=format, codec=codec, latents=latents, embeddings=embeddings, height=height, width=width,
        text_length=text_length, pooled=pooled, schedule=schedule,
    )  # fmt: skip
    card = _card(gpu, tflops)
    manifest, folder, configs = _outline(teacher, count, flags)
    rate = _rate_flops(card, tflops, dtype)
    from commands.planning import build_facts, gpu_verdict

    facts = build_facts(manifest, folder, batch_size=batch_size, rate_flops=rate, gpus=gpus)
    verdicts = [gpu_verdict(stage.replace("_", " "), facts["gpu_memory"][stage], card) for stage in _STAGES if card]
    if disk is not None:
        verdicts.append(_disk_verdict(disk, facts["disk"]))
    facts = {"teacher": {"source": folder.source, "configs": configs}, **facts}
    facts |= {"gpu": _gpu_facts(card, rate, gpus), "verdicts": verdicts}
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    _print_build(facts)


_STAGES = ("text_stage", "sample_stage")


@plan_app.command("train")
def plan_train(
    student: Annotated[str, typer.Option(help="small, base, large, xl, a T5 hub name, a config, pocket-small.")],
    cache: Annotated[str | None, typer.Option(help="A cache that is there; or --teacher for one that is not.")] = None,
    teacher: Annotated[str | None, typer.Option(help="As for plan build, without --cache.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Of the cache to come.")] = None,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of the cache to come.")] = "bfloat16",
    codec: Annotated[Literal["plain", "compact", "int8"], typer.Option(help="Of the cache to come.")] = "compact",
    latents: Annotated[Literal["derived", "stored"], typer.Option(help="Of the cache to come.")] = "derived",
    batch_size: int = 32,
    steps: Annotated[int, typer.Option(min=0, help="Optimizer steps with the vision loss.")] = 1000,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps with the embedding loss before them.")] = 0,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Judge by per-block checkpointing (not in this version yet).")
    ] = False,
    gpu: Gpu = None,
    tflops: Tflops = None,
    as_json: Json = False,
    settings: Settings = None,
) -> None:
    """What training a student will take, beside the paper's recipe. Loads and downloads nothing.

    Example: understudy plan train --teacher FLUX.1-dev --student base --batch-size 4 --steps 50000 --gpu 4090
    """
    if batch_size < 1 or steps + warmup_steps == 0:
        raise BadSettings(
            f"--batch-size is {batch_size}, --steps {steps} and --warmup-steps {warmup_steps}: nothing would be trained"
        )
    if (cache is None) == (teacher is None):
        raise BadSettings("plan train needs one of --cache (a cache that is there) and --teacher (for one to come)")
    card = _card(gpu, tflops)
    if cache is not None:
        quiet_device("cpu")
        from storage_schemas.folders import open_folder
        from storage_schemas.reader import read_manifest

        manifest, configs = read_manifest(open_folder(cache)), f"the manifest of {cache}"
    else:
        flags = {"resolution": resolution, "dtype": dtype, "codec": codec, "latents": latents}
        manifest, _, configs = _outline(str(teacher), 1, flags)
    rate = _rate_flops(card, tflops, manifest.sampling.dtype)
    from commands.planning import gpu_verdict, train_facts

    facts = train_facts(
        manifest, student_source(student), batch_size=batch_size, steps=steps, warmup_steps=warmup_steps,
        rate_flops=rate,
    )  # fmt: skip
    way = "with_checkpointing" if checkpointing else "this_version"
    verdicts = [gpu_verdict(f"training ({_WAYS[way]})", facts["ways"][way]["gpu_memory"], card)] if card else []
    facts = {"teacher": {"source": manifest.source, "configs": configs}, **facts}
    facts["student"]["source"] = student
    facts |= {"gpu": _gpu_facts(card, rate, 1), "verdicts": verdicts}
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    _print_train(facts)


_WAYS = {"this_version": "this version", "with_checkpointing": "with checkpointing, not in this version yet"}


def _outline(name: str, count: int | None, flags: dict[str, Any]) -> tuple["Manifest", "TeacherFolder", str]:
    from cache_builder.settings import PlannedBuild, outline_manifest

    asked = PlannedBuild.from_flags(**flags)
    if (count is None) == (not asked.prompts):
        raise BadSettings("plan build needs one of --prompts FILE and --count N")
    replicas = None
    if count is None:
        from cache_builder.prompt_files import read_prompts

        texts = read_prompts(asked.prompts, limit=asked.limit).texts
        count, replicas = len(texts), [asked.replicas * text.repeat for text in texts]
    quiet_device("cpu")
    from models.planned_teacher import planned_teacher
    from models.teacher_folder import BUILD_PARTS

    if name == POCKET:
        folder, configs = resolve_teacher(name, BUILD_PARTS), "configuration files of the embedded pocket"
    else:
        folder, configs = planned_teacher(name)
    count = min(count, asked.limit or count)
    return outline_manifest(asked, folder, prompt_count=count, replicas=replicas), folder, configs


def _card(gpu: str | None, tflops: float | None) -> "Card | None":
    from models.cards import find_card

    if tflops is not None and tflops <= 0:
        raise BadSettings(f"--tflops is {tflops}, expected the TFLOP/s that are reached, above 0")
    return None if gpu is None else find_card(gpu)


def _rate_flops(card: "Card | None", tflops: float | None, dtype: str) -> float | None:
    if tflops is not None:
        return tflops * 1e12
    # The table is of bf16: float32 is slower by a factor that depends on the card.
    return card.achieved_flops_per_s if card is not None and dtype == "bfloat16" else None


def _gpu_facts(card: "Card | None", rate: float | None, gpus: int) -> dict[str, Any]:
    from models.cards import UTILISATION, UTILISATION_SOURCE

    return {
        "name": card.name if card else None,
        "count": gpus,
        "memory_gib": card.memory_gib if card else None,
        "peak_bf16_flop_per_second": card.bf16_tflops * 1e12 if card and card.bf16_tflops else None,
        "peak_source": card.source + ("" if card.checked else " (not checked)") if card else None,
        "bandwidth_gb_per_second": card.bandwidth_gb_per_s if card else None,
        "achieved_flop_per_second": rate,
        "utilisation_ratio": UTILISATION,
        "utilisation_source": UTILISATION_SOURCE,
    }


def _disk_verdict(where: str, facts: dict[str, Any]) -> str:
    from cache_builder.disk import free_disk

    folder, free = free_disk(where)
    low, high = facts["stored_low_bytes"] / _GIB, facts["stored_high_bytes"] / _GIB
    room = f"{low:,.1f} to {high:,.1f} GiB (estimated), the disk of {folder} has {free / _GIB:,.1f} GiB free"
    if high * _GIB <= free:
        return f"fits: the cache, {room}"
    return f"does not fit: the cache, {room}; give a smaller --limit, another --codec, another disk"


def _print_build(facts: dict[str, Any]) -> None:
    cache, compute, disk = facts["cache"], facts["compute"], facts["disk"]
    out.print(f"teacher: {facts['teacher']['source']}; {facts['teacher']['configs']}", markup=False)
    out.print(
        f"cache: {cache['prompts']:,} prompts, {cache['trajectories']:,} trajectories of {cache['steps']} steps, "
        f"{cache['height_px']} px, {cache['text_tokens']} text tokens, {cache['dtype']}, {cache['format']}, "
        f"codec {cache['codec']}, latents {cache['latents']}",
        markup=False,
    )
    named = ", ".join(f"{name.replace('_', ' ')} {_count_text(n)}" for name, n in facts["parameters"].items())
    out.print(f"parameters: {named}", markup=False)
    table = Table("array", "rows", "KiB per row", "raw GiB", "on disk GiB, estimated")
    for size in facts["arrays"]:
        table.add_row(
            size["name"], f"{size['rows']:,}", f"{size['row_bytes'] / 1024:,.1f}", f"{size['raw_bytes'] / _GIB:,.2f}",
            _range(size["stored_low_bytes"], size["stored_high_bytes"]),
        )  # fmt: skip
    table.add_row("all", "", "", f"{disk['raw_bytes'] / _GIB:,.2f}",
                  _range(disk["stored_low_bytes"], disk["stored_high_bytes"]))  # fmt: skip
    out.print(table)
    table = Table("stage", "TFLOP each", "hours", "weights GiB", "activations GiB", "GPU memory GiB, calculated")
    for stage, each in (("text", "text_flop_per_prompt"), ("sample", "sample_flop_per_trajectory")):
        memory = facts["gpu_memory"][f"{stage}_stage"]
        table.add_row(
            f"{stage}, batch {memory['batch_size']}", f"{compute[each] / 1e12:,.2f}",
            _hours_text(compute[f"{stage}_hours"]), f"{memory['weights_bytes'] / _GIB:.2f}",
            f"{memory['activations_bytes'] / _GIB:.2f}", f"{memory['total_bytes'] / _GIB:.2f}",
        )  # fmt: skip
    out.print(table)
    out.print(f"host memory: {facts['host_memory_bytes'] / _GIB:.1f} GiB (calculated)", markup=False)
    if compute["write_bytes_per_second"] is not None:
        out.print(f"writing: {compute['write_bytes_per_second'] / 1e6:.2f} MB/s raw", markup=False)
    _print_gpu(facts)


def _print_train(facts: dict[str, Any]) -> None:
    training = facts["training"]
    out.print(f"teacher: {facts['teacher']['source']}; {facts['teacher']['configs']}", markup=False)
    out.print(
        f"student: {facts['student']['source']}, {_count_text(facts['student']['parameters'])} parameters with its "
        f"projection; {training['warmup_steps']:,} steps of warm-up and {training['steps']:,} of the vision loss at "
        f"batch {training['batch_size']}",
        markup=False,
    )
    table = Table("", *(_WAYS[way] for way in facts["ways"]))
    ways = list(facts["ways"].values())
    rows = (
        ("GPU memory, GiB (calculated)", [f"{way['gpu_memory']['total_bytes'] / _GIB:.1f}" for way in ways]),
        ("  weights", [f"{way['gpu_memory']['weights_bytes'] / _GIB:.1f}" for way in ways]),
        ("  student and AdamW", [f"{way['gpu_memory']['student_bytes'] / _GIB:.1f}" for way in ways]),
        ("  activations", [f"{way['gpu_memory']['activations_bytes'] / _GIB:.1f}" for way in ways]),
        ("TFLOP per sample, forward and backward", [f"{way['flop_per_sample'] / 1e12:.1f}" for way in ways]),
        ("seconds per vision step", [_number(way["seconds_per_step"], ".2f") for way in ways]),
        ("hours of warm-up, at least", [_hours_text(way["warmup_hours"]) for way in ways]),
        ("hours of the vision loss", [_hours_text(way["vision_hours"]) for way in ways]),
        ("hours of the paper's 320,000 steps of 32", [_hours_text(way["paper_recipe_hours"]) for way in ways]),
        ("used of the cache, MB/s", [_number(way["used_bytes_per_second"], ".1f", 1e6) for way in ways]),
        ("read if nothing is pooled, MB/s", [_number(way["read_bytes_per_second"], ".1f", 1e6) for way in ways]),
    )
    for name, values in rows:
        table.add_row(name, *values)
    out.print(table)
    out.print(f"host memory: {facts['host_memory_bytes'] / _GIB:.1f} GiB (calculated)", markup=False)
    _print_gpu(facts)


def _print_gpu(facts: dict[str, Any]) -> None:
    gpu = facts["gpu"]
    if gpu["achieved_flop_per_second"] is None:
        out.print(f"hours: not known, {_why_no_rate(gpu)}", markup=False)
    else:
        rate = f"{gpu['achieved_flop_per_second'] / 1e12:.1f} TFLOP/s"
        peak = gpu["peak_bf16_flop_per_second"]
        known = f", of {peak / 1e12:.1f} dense bf16 ({gpu['peak_source']})" if peak else ""
        expected = peak and abs(gpu["achieved_flop_per_second"] / peak - gpu["utilisation_ratio"]) < 1e-9
        how = f"; {gpu['utilisation_source']}" if expected else "; as --tflops says"
        out.print(f"hours: at {rate} on each of {gpu['count']} x {gpu['name'] or 'GPU'}{known}{how}", markup=False)
    for verdict in facts["verdicts"]:
        out.print(verdict, markup=False)


def _why_no_rate(gpu: dict[str, Any]) -> str:
    if gpu["name"] is None:
        return "no card is named; give --gpu NAME or --tflops X"
    if gpu["peak_bf16_flop_per_second"] is None:
        return f"{gpu['name']} has no bf16 tensor cores; give --tflops X"
    return f"the rate of {gpu['name']} is that of bfloat16; give --tflops X for float32"


def _range(low: float, high: float) -> str:
    return f"{low / _GIB:,.2f}" if low == high else f"{low / _GIB:,.2f} to {high / _GIB:,.2f}"


def _count_text(count: int) -> str:
    return f"{count / 1e9:.3f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _hours_text(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:,.2f}" if hours < 100 else f"{hours:,.0f}"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "-" if value is None else f"{value / unit:{form}}"
