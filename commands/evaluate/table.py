"""`secondcast evaluate table`: the paper's table shape, and its plots."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD

from secondcast.commands.evaluate.cache import (
    Pocket,
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

# What the teacher, its int8 form and the replay error are called in tables and plots.
_OWN_NAMES = ("teacher", "teacher, 8 bit", "replay_error")
_FORMATS = ("text", "markdown", "json")
_CACHE_FLAGS = ("backbone", "num_trajectories", "closed_loop")
_POCKET_FLAGS = ("num_prompts", "steps", "guidance", "seed", "quantized_baseline")


def evaluate_table(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]RUN...", help="Runs or exports; those of one NAME are seeds of one student."),
    ],
    pocket: Pocket = False,
    cache: Annotated[
        str | None, typer.Option(help="Distances from the teacher on the held-out trajectories of this cache.")
    ] = None,
    backbone: BackboneName = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Held-out captions of --pocket.")] = CAPTIONS,
    num_trajectories: Annotated[int, typer.Option(min=1, help="Held-out trajectories of --cache.")] = TRAJECTORIES,
    options: ClosedLoop = ClosedLoop(),
    sampling: PocketSampling = PocketSampling(),
    seed: Annotated[int, typer.Option(min=0, help="Of --pocket's captions and noise.")] = 0,
    quantized_baseline: Annotated[
        bool, typer.Option("--quantized-baseline/--no-quantized-baseline", help="A row for the teacher's T5 in int8.")
    ] = True,
    format: Annotated[str, typer.Option(help="text, markdown, json.")] = "text",
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Table and plots go there; what is scored is kept there too."),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    quiet: Quiet = False,
    config: Config = None,
) -> None:
    """Students as rows, the teacher first: scores by dimension, distances on a cache. Given again, it goes on.

    Example: secondcast evaluate table small=run-1 small=run-2 base=run-3 --pocket --out results
    """
    if not pocket and cache is None:
        raise SettingsError(
            "evaluate table needs --pocket (exact scores) or --cache CACHE (distances from the teacher)"
        )
    given = [name for name in (*_CACHE_FLAGS, *_POCKET_FLAGS) if is_given(context, name)]
    refuse_idle(given, _CACHE_FLAGS, "--cache", there=cache is not None)
    refuse_idle(given, _POCKET_FLAGS, "--pocket", there=pocket)
    if format not in _FORMATS:
        raise SettingsError(f"--format is {format!r}, expected one of {', '.join(_FORMATS)}")
    groups = grouped(runs)
    scoring = CacheScoring(num_trajectories=num_trajectories, **options.given)
    places = [place for group in groups.values() for place in group]
    # Before hours of scoring, and before torch: the last run may be the one that is not there.
    check_students(places)
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


def _what_is_left(folder: Path | None) -> str:
    if folder is None:
        return "nothing is kept, and the same command begins anew; --out DIR keeps what is scored"
    return f"what was scored is kept in {folder}; the same command goes on from there"


def grouped(given: Sequence[str]) -> dict[str, list[Path]]:
    """Runs by name: [NAME=]RUN, of which several may have one name."""
    groups: dict[str, list[Path]] = {}
    unnamed: dict[str, str] = {}
    for text in given:
        name, sign, place = text.partition("=")
        # A folder may have a sign of equality in its name, a name has no slash.
        if not sign or "/" in name or Path(text).exists():
            name, place = Path(text).resolve().name, text
            if name in groups:
                raise SettingsError(
                    f"two runs are named {name!r}, {unnamed.get(name, groups[name][0])} and {text}: name them, as in "
                    f"{name}-2={text}, or both alike, if they are seeds of one student"
                )
            unnamed[name] = text
        if not name or not place:
            raise SettingsError(f"{text!r} names no run, expected [NAME=]RUN, as in small=my-run")
        if name in _OWN_NAMES:
            raise SettingsError(f"{text} would be named {name!r}, as a line of ours is: name it, as in student={place}")
        if Path(place).resolve() in [one.resolve() for one in groups.get(name, ())]:
            raise SettingsError(
                f"{place} is given twice as {name!r}: runs of one name are seeds of one student, and a run counted "
                f"twice narrows the interval; give it once, or another run"
            )
        groups.setdefault(name, []).append(Path(place))
    return groups


def print_scores(table: "Table", format: str) -> None:
    """Scores as text, Markdown or JSON."""
    from secondcast.evaluation.tables.table import caption, lines_of, markdown

    (_, _, _, *dimensions), *rows = lines_of(table)
    lines = [["", *dimensions]]
    for name, parameters, runs, *cells in rows:
        several = f", {runs} runs" if runs != "1" else ""
        # An interval below its mean: eight columns fit a terminal of 80.
        lines.append([f"{name}\n{parameters}{several}", *(cell.replace(" (", "\n").rstrip(")") for cell in cells)])
    _print_form(lines, markdown(table), table, format, caption(table))


def print_errors(table: "ErrorTable", scores: "Table | None", format: str) -> None:
    """Distances as text, Markdown or JSON; of the latter one document together with the scores, where there are."""
    from secondcast.evaluation.tables.error_table import error_caption, error_lines, error_markdown

    if scores is not None and format == "json":
        print_json({"pocket": scores.json_value(), "cache": table.json_value()})
        return
    _print_form(error_lines(table), error_markdown(table), table, format, error_caption(table))


def _print_form(lines: list[list[str]], markdown: str, record: Any, format: str, caption: str) -> None:
    """A table in the form that is asked for; `record` is what JSON has."""
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
