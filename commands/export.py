"""`secondcast export`: a student in the form that another program takes."""

from pathlib import Path
from typing import Annotated

import typer

from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.resolve import Quiet, quiet_device, terminal
from secondcast.trainer.run.usage_snippets import Form

_NEXT = {
    "diffusers": "give it to FluxPipeline.from_pretrained(..., text_encoder_2=...), see its README.md",
    "distillt5": "the form of the published DistillT5 checkpoint, see its README.md",
    "comfyui": "put it into ComfyUI/models/clip for the DistillT5 node",
}


def export(
    student: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder (its best checkpoint), or an export.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder; for comfyui a new .safetensors file.")],
    to: Annotated[
        Form,
        typer.Option(help="For FluxPipeline; as the published DistillT5 checkpoint; for the DistillT5 node."),
    ] = "diffusers",
    quiet: Quiet = False,
) -> None:
    """Write the best student of a run as a folder that FluxPipeline takes as text_encoder_2, or for other programs.

    Example: secondcast export my-run my-student
    """
    quiet_device("cpu")
    from secondcast.trainer.run.export import export as run_export

    for remark in run_export(student, folder, to=to):
        terminal(quiet).say(remark)
    print_line(f"{folder}: {_NEXT[to]}")
