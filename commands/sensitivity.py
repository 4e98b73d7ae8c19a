"""`understudy sensitivity`: what the transformer reads in the text embeddings of a cache."""

from typing import Annotated, Any, Literal

import typer

from commands.resolve import CachePath, Device, Quiet, Settings, Verify, out, quiet_device, resolve_teacher, terminal


def sensitivity(
    cache: CachePath,
    products: Annotated[int, typer.Option(help="Vector-Jacobian products per prompt.")] = 4,
    prompts: Annotated[int, typer.Option(help="How many are drawn of those that training sees.")] = 1024,
    steps: Annotated[int | None, typer.Option(help="Of each trajectory, spread evenly; default: all.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Where transformer/ lies here; default: as recorded.")] = None,
    batch_size: Annotated[int, typer.Option(help="Steps of prompts that go through the transformer at once.")] = 8,
    part_size: Annotated[int, typer.Option(help="Prompts put on disk together: what a kill loses at most.")] = 32,
    backbone_dtype: Annotated[
        Literal["cache", "bfloat16", "float32"], typer.Option(help="cache: as recorded.")
    ] = "cache",
    modulation: Annotated[
        Literal["auto", "table", "host", "live"], typer.Option(help="As for train: less memory, the same numbers.")
    ] = "auto",
    checkpoint_blocks: Annotated[
        int, typer.Option(metavar="N", help="Compute every N-th block twice, for less memory; 0: none.")
    ] = 0,
    resident_blocks: Annotated[
        int | None, typer.Option(metavar="N", help="Keep N blocks on the GPU, stream the others from the host.")
    ] = None,
    quantize: Annotated[
        Literal["none", "int8", "fp8", "nf4"], typer.Option(help="Its blocks' weights in 8 or 4 bits.")
    ] = "none",
    attention_backend: Annotated[
        str | None, typer.Option(help="diffusers' attention backend; default: torch's own.")
    ] = None,
    worker: Annotated[
        str | None, typer.Option(metavar="i/n", help="Make every n-th part; the last one puts all together.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which prompts and which products are drawn.")] = 0,
    anew: Annotated[bool, typer.Option("--anew", help="Delete what was measured before.")] = False,
    verify: Verify = "once",
    device: Device = "auto",
    quiet: Quiet = False,
    settings: Settings = None,
) -> None:
    """Measure, once, which directions and tokens of an embedding move the prediction: for --loss sensitivity.

    Given again, it goes on.

    Example: understudy sensitivity my-cache --prompts 256 --products 4
    """
    flags: dict[str, Any] = dict(
        products=products, prompts=prompts, steps=steps, batch_size=batch_size, part_size=part_size,
        backbone_dtype=backbone_dtype, modulation=modulation, checkpoint_blocks=checkpoint_blocks,
        resident_blocks=resident_blocks, quantize=quantize, attention_backend=attention_backend, seed=seed,
    )  # fmt: skip
    from cache_builder.sensitivity_plan import SensitivitySettings
    from cache_builder.workers import Worker
    from storage_schemas.reader import Cache

    # Before torch is loaded: a wrong flag is told at once.
    asked = SensitivitySettings.from_flags(**flags)
    owner = Worker() if worker is None else Worker.parse(worker)
    opened = Cache.open(cache, verify=verify)
    torch_device = quiet_device(device)
    from cache_builder.sensitivity import measure
    from models.teacher_folder import REPLAY_PARTS

    teacher = resolve_teacher(backbone or opened.manifest.source, REPLAY_PARTS)
    found = measure(
        opened, teacher, asked, device=torch_device, progress=terminal(quiet), worker=owner, anew=anew
    )  # fmt: skip
    if found is not None:
        told = found.record.predicted_correlation
        rest = (
            "; of so few prompts the token weights of others cannot be predicted: they count as 1"
            if told is None
            else f"; weights of other prompts are predicted with a correlation of {told:.2f}"
        )
        out.print(
            f"{cache}: of {len(found.metric_DD)} directions of an embedding {found.record.effective_rank:.1f} matter "
            f"(effective rank), by {len(found.record.plan.prompt_ids):,} prompts{rest}",
            markup=False,
        )
