"""`secondcast export`: write a student in the format of another program."""

from pathlib import Path
from typing import Annotated

import typer

from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.resolve import Quiet, quiet_device, terminal
from secondcast.models.memory.options import TextQuantization
from secondcast.trainer.run.usage_snippets import Form

_NEXT = {
    "diffusers": "pass it to the teacher's pipeline by the program in its README.md",
    "distillt5": "in the format of the published DistillT5 checkpoint, see its README.md",
    "comfyui": "copy it to ComfyUI/models/clip for the DistillT5 node",
}


def export(
    student: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder (its best checkpoint is exported), or an export.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; for comfyui a new .safetensors file.")],
    to: Annotated[
        Form,
        typer.Option(
            help="Format: diffusers for FluxPipeline, distillt5 as the published DistillT5 checkpoint, comfyui for the "
            "DistillT5 node."
        ),
    ] = "diffusers",
    quantize: Annotated[
        TextQuantization | None,
        typer.Option(help="Store the matrices in 8 or 4 bits (int8, nf4), with --to diffusers: smaller, less exact."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Export the best student of a run as a text_encoder_2 folder for FluxPipeline, or for another program.

    Example: secondcast export my-run my-student
    """
    quiet_device("cpu")
    from secondcast.trainer.run.export import export as run_export
    from secondcast.trainer.run.export import weights_text

    for remark in run_export(student, folder, to=to, quantize=quantize):
        terminal(quiet).say(remark)
    print_line(f"{folder}: {weights_text(folder)}; {_NEXT[to]}")
