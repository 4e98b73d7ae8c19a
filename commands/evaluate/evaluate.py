"""The commands that compare students with the teacher."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secondcast.commands.evaluate.cache import (
    CACHE_FLAGS,
    POCKET_FLAGS,
    NumPrompts,
    NumTrajectories,
    Pocket,
    check_flags,
    check_students,
    print_closed_loop,
    print_open_loop,
    score_on_cache,
    told_when_interrupted,
)
from secondcast.commands.evaluate.compbench import evaluate_compbench
from secondcast.commands.evaluate.images import evaluate_images
from secondcast.commands.evaluate.paper import evaluate_paper
from secondcast.commands.evaluate.table import evaluate_table
from secondcast.commands.shell.config_file import Config
from secondcast.commands.shell.console import PlainTable, print_json, print_table
from secondcast.commands.shell.flags import add_command, is_given
from secondcast.commands.shell.outputs import OutputFile, Overwrite, check_picture, picture_bytes
from secondcast.commands.shell.resolve import (
    POCKET,
    BackboneName,
    Device,
    Json,
    Quiet,
    Verify,
    quiet_device,
    resolve_teacher,
    terminal,
)
from secondcast.evaluation.settings.cache_scoring import TRAJECTORIES, CacheScoring, CacheScoringOptions
from secondcast.evaluation.settings.pocket import CAPTIONS, PocketSampling

if TYPE_CHECKING:
    from secondcast.evaluation.pocket_scores import Scored
    from secondcast.evaluation.results import Evaluation
    from secondcast.evaluation.sampling import Generator


evaluate_app = typer.Typer(no_args_is_help=True, help="Compare students with the teacher.")


def evaluate_score(
    context: typer.Context,
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="Run folder or export.")],
    cache: Annotated[
        str | None,
        typer.Option(help="Measure errors on held-out trajectories of this cache (a folder or s3://bucket/prefix)."),
    ] = None,
    pocket: Pocket = False,
    num_trajectories: NumTrajectories = TRAJECTORIES,
    num_prompts: NumPrompts = CAPTIONS,
    backbone: BackboneName = None,
    options: CacheScoringOptions = CacheScoringOptions(),
    verify_checksums: Verify = "once",
    out_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE.json", help="Write all errors on --cache, by trajectory and step."),
    ] = None,
    sampling: PocketSampling = PocketSampling(),
    sample_grid: Annotated[
        Path | None, typer.Option(help="Also write a PNG of 12 captions of --pocket, side by side.")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Compare a student with its teacher on held-out prompts: on a cache, on the pocket world, or both.

    Example: secondcast evaluate score my-run --cache my-cache --out my-run.json

    Example: secondcast evaluate score my-run --pocket --sample-grid side-by-side.png
    """
    given = [name for name in (*CACHE_FLAGS, *POCKET_FLAGS, "seed") if is_given(context, name)]
    check_flags(
        given,
        cache=cache is not None,
        pocket=pocket,
        closed_loop=options.closed_loop,
        random_baseline=options.random_baseline,
    )
    side_by_side = None if sample_grid is None else _picture_file(sample_grid, overwrite)
    facts: dict[str, Any] = {}
    if cache is not None:
        scored = score_on_cache(
            student, cache, CacheScoring(num_trajectories=num_trajectories, **options.given), backbone=backbone,
            verify_checksums=verify_checksums, out_file=out_file, overwrite=overwrite, device=device, quiet=quiet,
            opened=_ignore if as_json else _print_open_loop,
        )  # fmt: skip
        facts["cache"] = _summary(scored)
        if not as_json:
            print_closed_loop(facts["cache"])
    if pocket:
        with told_when_interrupted(lambda: "nothing of --pocket is kept; the same command starts over"):
            results, captions = score_pocket(
                student, num_prompts, sampling.steps, sampling.guidance, options.seed, device, quiet
            )
        facts["pocket"] = score_rows(results)
        if cache is None or not as_json:
            print_scores(results, as_json)
        if side_by_side is not None:
            side_by_side.write(picture_bytes(compare_picture(results, captions), side_by_side.path))
    if cache is not None and as_json:
        print_json(facts)


add_command(evaluate_app, evaluate_score, "score")
add_command(evaluate_app, evaluate_images, "images")
add_command(evaluate_app, evaluate_compbench, "compbench")
add_command(evaluate_app, evaluate_table, "table")
add_command(evaluate_app, evaluate_paper, "paper")


def _summary(evaluation: "Evaluation") -> dict[str, Any]:
    from secondcast.evaluation.tables.aggregates import summary

    return summary(evaluation)


def _print_open_loop(evaluation: "Evaluation") -> None:
    print_open_loop(_summary(evaluation))


def _ignore(evaluation: "Evaluation") -> None:
    """Print nothing: JSON is one document at the end."""


def _picture_file(path: Path, overwrite: bool) -> OutputFile:
    check_picture(path, "--sample-grid")
    return OutputFile.open(path, overwrite=overwrite, named="--sample-grid")


def pocket_generator(
    num_prompts: int, steps: int, guidance: float, seed: int, device: str
) -> tuple["Generator", list[str]]:
    """Generator of the pocket teacher, and held-out captions for it."""
    torch_device = quiet_device(device)
    import torch

    from secondcast.evaluation.sampling import Generator
    from secondcast.models.teacher.folder import BUILD_PARTS
    from secondcast.pocket.world import captions

    teacher = resolve_teacher(POCKET, BUILD_PARTS)
    generator = Generator.open(
        teacher, resolution=None, steps=steps, guidance=guidance, seed=seed, dtype=torch.float32, device=torch_device
    )
    return generator, captions(num_prompts, seed=seed, split="heldout")


def score_pocket(
    student: Path, num_prompts: int, steps: int, guidance: float, seed: int, device: str, quiet: bool
) -> tuple[list["Scored"], list[str]]:
    """Score teacher, student and untrained student on held-out captions; returns results and captions."""
    check_students([student])
    generator, texts = pocket_generator(num_prompts, steps, guidance, seed, device)
    import torch

    from secondcast.evaluation.pocket_scores import score_encoders
    from secondcast.evaluation.text_encoder import teacher_and_students

    encoders = teacher_and_students(
        student, generator.teacher, dtype=torch.float32, device=generator.backbone.device, seed=seed
    )
    results = score_encoders(generator, encoders, texts, batch_size=64, progress=terminal(quiet))
    return results, texts


SHOWN = 12
"""Number of captions in a picture of results."""


def compare_picture(results: list["Scored"], captions: list[str]) -> Any:
    """The first captions side by side."""
    from secondcast.evaluation.pictures.picture import side_by_side

    shown = slice(0, SHOWN)
    return side_by_side(
        [result.name for result in results], [result.images_NHWC[shown] for result in results], captions[shown]
    )


def score_rows(results: list["Scored"]) -> list[dict[str, Any]]:
    """Rows of the table of scores."""
    from secondcast.evaluation.pocket_scores import table_rows

    return table_rows(results)


def print_scores(results: list["Scored"], as_json: bool) -> None:
    """Print the table of scores, or JSON."""
    rows = score_rows(results)
    if as_json:
        print_json(rows)
        return
    table = PlainTable(
        "score", "captions", *(result.name for result in results), title="held-out captions, 95 % intervals"
    )
    for row in rows:
        cells = [f"{c['mean']:.2f} ({c['low']:.2f}-{c['high']:.2f})" for c in (row[r.name] for r in results)]
        table.add_row(row["dimension"], str(row["captions"]), *cells)
    print_table(table)
