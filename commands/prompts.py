"""`understudy prompts`: make prompt sets."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from commands.resolve import out, write_text
from storage_schemas.errors import BadSettings

prompts_app = typer.Typer(no_args_is_help=True, help="Make prompt sets.")


@prompts_app.command("pocket")
def prompts_pocket(
    out_file: Annotated[Path, typer.Argument(metavar="FILE", help="Text file to write, a prompt per line.")],
    count: Annotated[int, typer.Option(min=1, help="How many distinct captions.")] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    split: Annotated[
        Literal["train", "heldout"], typer.Option(help="heldout: compositions never trained on.")
    ] = "train",
) -> None:
    """Captions of the pocket world.

    Example: understudy prompts pocket prompts.txt --count 1024
    """
    from pocket.world import captions

    try:
        texts = captions(count, seed=seed, split=split)
    except ValueError as error:
        raise BadSettings(f"--count {count}: {error}") from error
    write_text(out_file, "".join(f"{text}\n" for text in texts))
    out.print(f"{len(texts)} captions in {out_file}", markup=False)
