"""`secondcast evaluate table`: a table like the paper's, and its plots."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD

from secondcast.commands.evaluate.cache import (
    NumPrompts,
    NumTrajectories,
    Pocket,
    check_one_form,
    check_students,
    checked_cache,
    refuse_idle,
    told_when_interrupted,
)
from secondcast.commands.evaluate.table_cache import ERROR_FILES, cache_table, write_error_results
from secondcast.commands.evaluate.table_pocket import SCORE_FILES, pocket_table, write_results
from secondcast.commands.shell.config_file import Config
from secondcast.commands.shell.console import PlainTable, print_json, print_line, print_lines, print_table
from secondcast.commands.shell.flags import is_given
from secondcast.commands.shell.outputs import OutputFolder, Overwrite
from secondcast.commands.shell.resolve import BackboneName, Device, Quiet
from secondcast.evaluation.settings.cache_scoring import TRAJECTORIES, CacheScoring, ClosedLoop
from secondcast.evaluation.settings.pocket import CAPTIONS, PocketSampling
from secondcast.storage_schemas.errors import SettingsError

if TYPE_CHECKING:
    from secondcast.evaluation.tables.error_table import ErrorTable
    from secondcast.evaluation.tables.table import Table

# Row names of the teacher, its int8 form and the replay error in tables and plots.
_OWN_NAMES = ("teacher", "teacher, 8 bit", "replay_error")
_FORMATS = ("text", "markdown", "json")
_CACHE_FLAGS = ("backbone", "num_trajectories", "closed_loop")
_POCKET_FLAGS = ("num_prompts", "steps", "guidance", "seed", "quantized_baseline")


def evaluate_table(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]RUN", help="Runs or exports; several with one NAME are seeds of one student."),
    ],
    pocket: Pocket = False,
    cache: Annotated[
        str | None, typer.Option(help="Measure distances from the teacher on held-out trajectories of this cache.")
    ] = None,
    backbone: BackboneName = None,
    num_prompts: NumPrompts = CAPTIONS,
    num_trajectories: NumTrajectories = TRAJECTORIES,
    options: ClosedLoop = ClosedLoop(),
    sampling: PocketSampling = PocketSampling(),
    seed: Annotated[int, typer.Option(min=0, help="Seed for the captions and noise of --pocket.")] = 0,
    quantized_baseline: Annotated[
        bool,
        typer.Option(
            "--quantized-baseline/--no-quantized-baseline", help="Add a row for the teacher's text encoder in int8."
        ),
    ] = True,
    format: Annotated[str, typer.Option(help="Output format: text, markdown or json.")] = "text",
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the table and plots; also keeps scores, to resume."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Compare students in a table: scores by dimension, distances on a cache. Run the same command again to resume.

    Example: secondcast evaluate table small=run-1 small=run-2 base=run-3 --pocket --out results
    """
    _check_sources(context, cache=cache is not None, pocket=pocket)
    if format not in _FORMATS:
        raise SettingsError(f"--format is {format!r}, expected one of {', '.join(_FORMATS)}")
    groups = grouped(runs)
    scoring = CacheScoring(num_trajectories=num_trajectories, **options.given)
    places = [place for group in groups.values() for place in group]
    # Before hours of scoring, and before importing torch: the last run may be missing.
    check_students(places)
    check_one_form(groups)
    opened = None if cache is None else checked_cache(places, cache, scoring, "once")
    results = None
    if folder is not None:
        from secondcast.evaluation.tables.plots import check_plotting

        check_plotting()
        names = [*(SCORE_FILES if pocket else ()), *(ERROR_FILES if opened is not None else ())]
        results = OutputFolder.open(folder, "evaluate table", names, overwrite=overwrite)
    with told_when_interrupted(lambda: _what_is_left(folder)):
        scores = None
        if pocket:
            scores = pocket_table(
                groups, count=num_prompts, steps=sampling.steps, guidance=sampling.guidance, seed=seed,
                quantized_baseline=quantized_baseline, folder=folder, device=device, quiet=quiet,
            )  # fmt: skip
            if results is not None:
                write_results(scores, groups, results, device)
            # Two tables are one JSON document.
            if opened is None or format != "json":
                print_scores(scores, format)
        if opened is not None:
            errors = cache_table(groups, opened, scoring, backbone=backbone, folder=folder, device=device, quiet=quiet)
            if results is not None:
                write_error_results(errors, results)
            print_errors(errors, scores, format)


def _check_sources(context: typer.Context, *, cache: bool, pocket: bool) -> None:
    if not pocket and not cache:
        raise SettingsError(
            "evaluate table needs --pocket (exact scores) or --cache CACHE (distances from the teacher)"
        )
    given = [name for name in (*_CACHE_FLAGS, *_POCKET_FLAGS) if is_given(context, name)]
    refuse_idle(given, _CACHE_FLAGS, "--cache", there=cache)
    refuse_idle(given, _POCKET_FLAGS, "--pocket", there=pocket)


def _what_is_left(folder: Path | None) -> str:
    if folder is None:
        return "nothing is kept, and the same command starts over; give --out DIR to keep scores"
    return f"finished scores are kept in {folder}; run the same command again to resume"


def grouped(given: Sequence[str]) -> dict[str, list[Path]]:
    """Runs by name, from [NAME=]RUN; several runs may share a name."""
    groups: dict[str, list[Path]] = {}
    unnamed: dict[str, str] = {}
    for text in given:
        name, sign, place = text.partition("=")
        # A folder name may contain an equals sign; a run name has no slash.
        if not sign or "/" in name or Path(text).exists():
            name, place = Path(text).resolve().name, text
            if name in groups:
                raise SettingsError(
                    f"two runs are named {name!r}, {unnamed.get(name, groups[name][0])} and {text}: name them, as in "
                    f"{name}-2={text}, or give both one name if they are seeds of one student"
                )
            unnamed[name] = text
        if not name or not place:
            raise SettingsError(f"{text!r} names no run, expected [NAME=]RUN, as in small=my-run")
        if name in _OWN_NAMES:
            raise SettingsError(f"{text} has the reserved name {name!r}: give it another name, as in student={place}")
        if Path(place).resolve() in [other.resolve() for other in groups.get(name, ())]:
            raise SettingsError(
                f"{place} is given twice as {name!r}: runs of one name are seeds of one student, and counting a run "
                f"twice narrows the interval; give it once, or give another run"
            )
        groups.setdefault(name, []).append(Path(place))
    return groups


def print_scores(table: "Table", format: str) -> None:
    """Print scores as text, Markdown or JSON."""
    from secondcast.evaluation.tables.table import caption, lines_of, markdown

    (_, _, _, _, *dimensions), *rows = lines_of(table)
    lines = [["", *dimensions]]
    for name, parameters, stored, runs, *cells in rows:
        several = f", {runs} runs" if runs != "1" else ""
        # Put the interval below its mean: eight columns fit into 80 characters.
        lines.append(
            [f"{name}\n{parameters}{several}\n{stored}", *(cell.replace(" (", "\n").rstrip(")") for cell in cells)]
        )
    _print_form(lines, markdown(table), table, format, caption(table))


def print_errors(table: "ErrorTable", scores: "Table | None", format: str) -> None:
    """Print distances as text, Markdown or JSON; JSON includes the scores, if any, in the same document."""
    from secondcast.evaluation.tables.error_table import error_caption, error_lines, error_markdown

    if scores is not None and format == "json":
        print_json({"pocket": scores.json_value(), "cache": table.json_value()})
        return
    _print_form(error_lines(table), error_markdown(table), table, format, error_caption(table))


def _print_form(lines: list[list[str]], markdown: str, record: Any, format: str, caption: str) -> None:
    """Print a table in the given format; `record` is the JSON content."""
    if format == "json":
        print_json(json.loads(record.model_dump_json()))
        return
    if format == "markdown":
        print_lines(markdown.splitlines())
        return
    shown = PlainTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    head, *rows = lines
    for heading in head:
        shown.add_column(heading)
    for row in rows:
        shown.add_row(*row)
    print_line(caption)
    print_table(shown)
