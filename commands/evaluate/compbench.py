"""`secondcast evaluate compbench`: write images as T2I-CompBench's own scripts read them."""

from pathlib import Path
from typing import Annotated

import typer

from secondcast.commands.evaluate.images import ImagePrompts, read_folders
from secondcast.commands.shell.console import print_line
from secondcast.commands.shell.outputs import check_folder_name
from secondcast.commands.shell.resolve import Quiet, terminal
from secondcast.storage_schemas.progress import counted


def evaluate_compbench(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images, from generate or elsewhere.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder, with a folder per category.")],
    prompts: ImagePrompts = None,
    quiet: Quiet = False,
) -> None:
    """Write images in the layout of T2I-CompBench's scripts, to score them by UniDet (spatial, 3d_spatial, numeracy).

    DIR/spatial is then what the scripts take as --outpath. The script of the complex mixture expects 10 images per
    prompt, and every prompt of complex_val.txt.

    Example: secondcast evaluate compbench pictures --out for-unidet
    """
    check_folder_name(out)
    from secondcast.evaluation.image_metrics.compbench import CATEGORIES
    from secondcast.evaluation.pictures.compbench_layout import write_layout

    pictures = read_folders([folder], prompts, terminal(quiet))[str(folder)]
    for category, count in write_layout(pictures, out, CATEGORIES).items():
        print_line(f"{out / category}: {counted(count, 'image')}")
