"""`secondcast evaluate paper`: the tables of the paper, from images to a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secondcast.commands.evaluate.cache import told_when_interrupted
from secondcast.commands.evaluate.images import picture_texts
from secondcast.commands.generate import IMAGES_AT_ONCE, ImageBatch
from secondcast.commands.shell.console import print_json, print_line, print_lines
from secondcast.commands.shell.outputs import OutputFolder, Overwrite
from secondcast.commands.shell.resolve import Device, Json, Quiet, quiet_device, resolve_teacher, terminal
from secondcast.models.memory.optional_packages import show_peft
from secondcast.models.memory.options import SamplingMemory

if TYPE_CHECKING:
    from secondcast.evaluation.tables.paper.making import Prompts
    from secondcast.evaluation.tables.paper.recipe import TableRecipe
    from secondcast.evaluation.tables.paper.results import PaperTable

_FILES = ("table.md", "table.json", "scaling.png", "embeddings.png", "index.html")


def evaluate_paper(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="TOML file with [rows.NAME] and [prompts.NAME], see recipes/tables."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for images, scores, the table and its page.")],
    memory: SamplingMemory = SamplingMemory(),
    batch_size: ImageBatch = IMAGES_AT_ONCE,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a table like the paper's: generate images for each text encoder, score them, and write a page.

    Run the same command again to resume. A cell that fails does not stop the others; the exit code is then 1.

    Example: secondcast evaluate paper recipes/tables/pocket.toml --out pocket-table
    """
    from secondcast.evaluation.tables.paper.recipe import read_recipe

    asked = read_recipe(recipe)
    if any(row.lora is not None for row in asked.rows.values()):
        show_peft()
    prompts = _prompts(asked)
    from secondcast.evaluation.tables.plots import check_plotting

    check_plotting()
    results = OutputFolder.open(out, "evaluate paper", _FILES, overwrite=overwrite, alone=True)
    torch_device = quiet_device(device)
    from secondcast.evaluation.tables.paper.making import Making
    from secondcast.evaluation.tables.paper.page import page
    from secondcast.evaluation.tables.paper.paper import make_table, table_files

    making = Making(
        recipe=asked, prompts=prompts, folder=out, find_teacher=resolve_teacher, memory=memory, batch_size=batch_size,
        device=torch_device, progress=terminal(quiet),
    )  # fmt: skip
    with told_when_interrupted(lambda: f"images and scores are kept in {out}; run the same command again to resume"):
        table, facts = make_table(making)
        files = table_files(table, facts)
        files["index.html"] = page(making, table, recipe.stem, files)
    for name in _FILES:
        if name in files:
            results.write(name, files[name])
        else:
            # Plots of an earlier table.
            results.remove(name)
    _print(table, out, as_json)
    if table.failures:
        raise typer.Exit(1)


def _prompts(recipe: "TableRecipe") -> "dict[str, Prompts]":
    from secondcast.cache_builder.prompts.files import read_prompts
    from secondcast.evaluation.tables.paper.making import Prompts

    found = {}
    for name, one in recipe.prompts.items():
        read = read_prompts(one.source, limit=one.limit)
        texts = [text for source in one.source for text in picture_texts(source)]
        found[name] = Prompts(prompts=[text.text for text in read.texts], categories=read.categories, texts=texts)
    return found


def _print(table: "PaperTable", out: Path, as_json: bool) -> None:
    from secondcast.evaluation.tables.paper.results import markdown

    if as_json:
        print_json(table.json_value())
        return
    print_lines(markdown(table).splitlines())
    print_line(f"{out / 'index.html'}: the table with images and plots; open it in a browser")
