"""`secondcast generate`: pictures with a student in T5-XXL's place."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.outputs import check_folder_name
from secondcast.commands.shell.resolve import (
    Device,
    Quiet,
    Settings,
    TeacherName,
    quiet_device,
    resolve_teacher,
    terminal,
)
from secondcast.storage_schemas.errors import BadSettings
from secondcast.storage_schemas.progress import counted


def generate(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="A run folder, an export, or `teacher`.")],
    teacher: TeacherName,
    prompts: Annotated[list[str], typer.Option(metavar="SOURCE", help="As after build --prompts; may be repeated.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the pictures and of index.jsonl.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first that many distinct prompts.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps.")] = 20,
    guidance: Annotated[float, typer.Option(min=0, help="FLUX's guidance scale.")] = 3.5,
    seed: Annotated[int, typer.Option(min=0, help="The noise is a function of seed and prompt.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 4,
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Pixels per side; default 512, or the teacher's own.")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; with --width, in place of --resolution.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; with --height.")] = None,
    text_length: Annotated[
        int | None, typer.Option(min=1, max=512, help="T5 tokens where `teacher` leads; a student has its own.")
    ] = None,
    pooled: Annotated[
        Literal["zero", "clip"], typer.Option(help="FLUX's pooled input; zero: as scored; clip: as FluxPipeline.")
    ] = "zero",
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="Of all arithmetic.")] = "bfloat16",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub repository.")] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    settings: Settings = None,
) -> None:
    """Write a picture per prompt and an index of them; T5-XXL is not loaded for a student. Given again, it goes on.

    Example: secondcast generate my-student --teacher pocket --prompts prompts.txt --out pictures
    """
    _check_size(resolution, height, width)
    check_folder_name(out)
    from secondcast.cache_builder.prompts.files import read_prompts

    texts = [text.text for text in read_prompts(prompts, limit=limit).texts]
    torch_device = quiet_device(device)
    from secondcast.evaluation.generate import Asked
    from secondcast.evaluation.generate import generate as run_generate
    from secondcast.evaluation.leader import teacher_parts

    asked = Asked(
        steps=steps, guidance=guidance, seed=seed, dtype=dtype, resolution=resolution, height=height, width=width,
        text_length=text_length, pooled=pooled,
    )  # fmt: skip
    found = resolve_teacher(teacher, teacher_parts(student, pooled), revision)
    made = run_generate(
        student, found, texts, out, asked, batch_size=batch_size, device=torch_device, progress=terminal(quiet)
    )
    there = len(texts) - made
    print_line(f"{out}: {counted(made, 'picture')}" + (f", {there} were there before" if there else ""))


def _check_size(resolution: int | None, height: int | None, width: int | None) -> None:
    for given, value, other, missing in (("height", height, "width", width), ("width", width, "height", height)):
        if value is not None and missing is None:
            raise BadSettings(f"--{given} is given without --{other}: give both, or --resolution for a square")
    if height is not None and resolution is not None:
        raise BadSettings("--resolution is given beside --height and --width: give one or the other")
