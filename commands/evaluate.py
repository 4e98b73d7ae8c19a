"""The commands that set students against the teacher."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from commands.evaluate_images import evaluate_images
from commands.evaluate_table import evaluate_table
from commands.resolve import POCKET, Device, Json, Quiet, out, quiet_device, resolve_teacher, terminal, write_picture
from storage_schemas.errors import BadSettings

if TYPE_CHECKING:
    from evaluation.pocket_scores import Scored

evaluate_app = typer.Typer(no_args_is_help=True, help="Students against the teacher.")
evaluate_app.command("images")(evaluate_images)
evaluate_app.command("table")(evaluate_table)


@evaluate_app.command("score")
def evaluate_score(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="A run folder or an export.")],
    pocket: Annotated[bool, typer.Option("--pocket", help="Exact scores on the pocket world.")] = False,
    count: Annotated[int, typer.Option(min=1, help="Held-out captions.")] = 192,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    guidance: float = 3.5,
    seed: int = 0,
    picture: Annotated[Path | None, typer.Option(help="Also write a dozen captions side by side, a PNG.")] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score teacher, trained and untrained student on captions that no training saw.

    Example: understudy evaluate score my-run --pocket --picture side-by-side.png
    """
    if not pocket:
        raise BadSettings("evaluate score needs --pocket: this version scores on the pocket world only")
    results, captions = score_pocket(student, count, steps, guidance, seed, device, quiet)
    print_scores(results, as_json)
    if picture is not None:
        write_picture(compare_picture(results, captions), picture)


def score_pocket(
    student: Path, count: int, steps: int, guidance: float, seed: int, device: str, quiet: bool
) -> tuple[list["Scored"], list[str]]:
    """Score teacher, student and untrained student on held-out captions; the results and the captions."""
    torch_device = quiet_device(device)
    import torch

    from evaluation.pocket_scores import score_encoders
    from evaluation.sampling import Studio
    from evaluation.text_encoders import teacher_and_students
    from models.teacher_folder import BUILD_PARTS
    from pocket.world import captions

    teacher = resolve_teacher(POCKET, BUILD_PARTS)
    studio = Studio.open(
        teacher, resolution=None, steps=steps, guidance=guidance, seed=seed, dtype=torch.float32, device=torch_device
    )
    encoders = teacher_and_students(student, teacher, dtype=torch.float32, device=torch_device, seed=seed)
    texts = captions(count, seed=seed, split="heldout")
    results = score_encoders(studio, encoders, texts, batch_size=64, progress=terminal(quiet))
    return results, texts


def compare_picture(results: list["Scored"], captions: list[str]) -> Any:
    """The first dozen captions side by side."""
    from evaluation.picture import side_by_side

    shown = slice(0, 12)
    return side_by_side(
        [result.name for result in results], [result.images_NHWC[shown] for result in results], captions[shown]
    )


def print_scores(results: list["Scored"], as_json: bool) -> None:
    """Print the table of scores, or JSON."""
    from evaluation.pocket_scores import table_rows

    rows = table_rows(results)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("score", "captions", *(result.name for result in results), title="held-out captions, 95 % intervals")
    for row in rows:
        cells = [f"{c['mean']:.2f} ({c['low']:.2f}-{c['high']:.2f})" for c in (row[r.name] for r in results)]
        table.add_row(row["dimension"], str(row["captions"]), *cells)
    out.print(table)
