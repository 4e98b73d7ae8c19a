"""`understudy evaluate table`: the paper's table shape, and its plots."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table as RichTable

from commands.evaluate_cache import refuse_idle
from commands.evaluate_table_cache import cache_table, write_error_results
from commands.resolve import (
    POCKET,
    Device,
    Quiet,
    check_folder,
    check_guidance,
    out,
    quiet_device,
    resolve_teacher,
    terminal,
)
from commands.train import is_given
from storage_schemas.errors import BadSettings, MissingExtra

if TYPE_CHECKING:
    from evaluation.scored_rows import ScoredRun
    from evaluation.table import Table

# What the teacher, its int8 form and the floor are called in tables and plots.
_OWN_NAMES = ("teacher", "teacher, 8 bit", "floor")
_FORMATS = ("text", "markdown", "json")
_CACHE_FLAGS = ("backbone", "trajectories", "closed_loop")
_POCKET_FLAGS = ("count", "steps", "guidance", "seed", "eight_bits")


def evaluate_table(
    context: typer.Context,
    runs: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]RUN...", help="Runs or exports; those of one NAME are seeds of one student."),
    ],
    pocket: Annotated[bool, typer.Option("--pocket", help="Exact scores on the pocket world.")] = False,
    cache: Annotated[
        str | None, typer.Option(help="Distances from the teacher on the held-out trajectories of this cache.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Where transformer/ and vae/ lie; default: as recorded.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Held-out captions of --pocket.")] = 192,
    trajectories: Annotated[int, typer.Option(min=1, help="Held-out trajectories of --cache.")] = 64,
    closed_loop: Annotated[int, typer.Option(min=0, help="Of these sampled anew, the student leading.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps of --pocket.")] = 20,
    guidance: Annotated[float, typer.Option(help="Of --pocket.")] = 3.5,
    seed: Annotated[int, typer.Option(min=0, help="Of --pocket's captions and noise.")] = 0,
    eight_bits: Annotated[
        bool, typer.Option("--eight-bits/--no-eight-bits", help="A row for the teacher's T5 in int8.")
    ] = True,
    format: Annotated[str, typer.Option(help="text, markdown, json.")] = "text",
    folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Table and plots go there; what is scored is kept there too."),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Students as rows, the teacher first: scores by dimension, distances on a cache. Given again, it goes on.

    Example: understudy evaluate table small=run-1 small=run-2 base=run-3 --pocket --out results
    """
    if not pocket and cache is None:
        raise BadSettings("evaluate table needs --pocket (exact scores) or --cache CACHE (distances from the teacher)")
    given = [name for name in (*_CACHE_FLAGS, *_POCKET_FLAGS) if is_given(context, name)]
    refuse_idle(given, _CACHE_FLAGS, "--cache", there=cache is not None)
    refuse_idle(given, _POCKET_FLAGS, "--pocket", there=pocket)
    if format not in _FORMATS:
        raise BadSettings(f"--format is {format!r}, expected one of {', '.join(_FORMATS)}")
    groups = grouped(runs)
    check_guidance(guidance)
    quiet_device(device)
    from models.student import student_folder

    # Before hours of scoring: the last run may be the one that is not there.
    for place in [place for places in groups.values() for place in places]:
        student_folder(place)
    if folder is not None:
        from evaluation.plots import check_plotting

        check_plotting()
        check_folder(folder)
    if pocket:
        scores = pocket_table(
            groups, count=count, steps=steps, guidance=guidance, seed=seed, eight_bits=eight_bits, folder=folder,
            device=device, quiet=quiet,
        )  # fmt: skip
        if folder is not None:
            write_results(scores, groups, folder, device)
        # Two tables are one JSON document.
        if cache is None or format != "json":
            print_table(scores, format)
    if cache is not None:
        from evaluation.error_table import error_lines, error_markdown

        errors = cache_table(
            groups, cache, count=trajectories, closed_loop=closed_loop, backbone=backbone, folder=folder,
            device=device, quiet=quiet,
        )  # fmt: skip
        if folder is not None:
            write_error_results(errors, folder)
        title = f"{errors.trajectories} held-out trajectories"
        if pocket and format == "json":
            print(json.dumps({"pocket": scores.json_value(), "cache": errors.json_value()}, indent=1))
            return
        print_lines(error_lines(errors), error_markdown(errors), errors, format, title)


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
                raise BadSettings(
                    f"two runs are named {name!r}, {unnamed.get(name, groups[name][0])} and {text}: name them, as in "
                    f"{name}-2={text}, or both alike, if they are seeds of one student"
                )
            unnamed[name] = text
        if not name or not place:
            raise BadSettings(f"{text!r} names no run, expected [NAME=]RUN, as in small=my-run")
        if name in _OWN_NAMES:
            raise BadSettings(f"{text} would be named {name!r}, as a line of ours is: name it, as in student={place}")
        if Path(place).resolve() in [one.resolve() for one in groups.get(name, ())]:
            raise BadSettings(
                f"{place} is given twice as {name!r}: runs of one name are seeds of one student, and a run counted "
                f"twice narrows the interval; give it once, or another run"
            )
        groups.setdefault(name, []).append(Path(place))
    return groups


def pocket_table(
    groups: Mapping[str, Sequence[Path]],
    *,
    count: int,
    steps: int,
    guidance: float,
    seed: int,
    eight_bits: bool,
    folder: Path | None,
    device: str,
    quiet: bool,
) -> "Table":
    """Score teacher and students on the same held-out captions and noise."""
    torch_device = quiet_device(device)
    import torch

    from evaluation.sampling import Studio
    from evaluation.scored_rows import computed_by
    from evaluation.table import Table, row_of
    from models.teacher_folder import BUILD_PARTS
    from pocket.world import captions
    from storage_schemas.digests import digest

    teacher, progress = resolve_teacher(POCKET, BUILD_PARTS), terminal(quiet)
    studio = Studio.open(
        teacher, resolution=None, steps=steps, guidance=guidance, seed=seed, dtype=torch.float32, device=torch_device
    )
    texts = captions(count, seed=seed, split="heldout")
    weights = [*(teacher.weight_hashes(part) for part in ("transformer", "vae")), teacher.config("scheduler")]
    asked = {"teacher": digest(weights), "count": str(count), "steps": str(steps), "guidance": repr(guidance)}
    asked |= {"seed": str(seed), **computed_by(device)}
    rows = []
    for name, encoders in _encoders(groups, teacher, torch_device, eight_bits, progress.say):
        found = [
            _scored(studio, encoder, texts, f"{name} {number}" if len(encoders) > 1 else name, asked, folder, progress)
            for number, encoder in enumerate(encoders, start=1)
        ]
        check_one_size(name, [one.parameters for one in found])
        rows.append(row_of(name, found[0].parameters, [one.by_dimension() for one in found]))
    return Table(captions=count, steps=steps, guidance=guidance, seed=seed, rows=tuple(rows))


def check_one_size(name: str, parameters: Sequence[int]) -> None:
    """Raise BadSettings unless the runs of one name are of one size."""
    if len(set(parameters)) > 1:
        raise BadSettings(
            f"the runs named {name!r} have {' and '.join(map(str, sorted(set(parameters))))} parameters: runs of one "
            f"name are seeds of one student; give another name to each size"
        )


def _encoders(
    groups: Mapping[str, Sequence[Path]], teacher: Any, device: Any, eight_bits: bool, say: Any
) -> Iterator[tuple[str, list[Any]]]:
    """Names of rows and their text encoders, loaded when it is their turn."""
    import torch

    from evaluation.encoder_rows import EIGHT_BITS, student_row, teacher_row
    from evaluation.leader import TEACHER

    yield TEACHER, [teacher_row(teacher, eight_bits=False, dtype=torch.float32, device=device)]
    if eight_bits:
        try:
            yield EIGHT_BITS, [teacher_row(teacher, eight_bits=True, dtype=torch.float32, device=device)]
        except MissingExtra as error:
            say(f"no row {EIGHT_BITS!r}: {error}")
    for name, places in groups.items():
        yield name, [student_row(name, place, teacher, device=device) for place in places]


def _scored(
    studio: Any, encoder: Any, texts: list[str], name: str, asked: dict[str, str], folder: Path | None, progress: Any
) -> "ScoredRun":
    from evaluation.pocket_scores import score_images
    from evaluation.scored_rows import ScoredRun, scored

    own = asked | {"encoder": encoder.digest}

    def score() -> ScoredRun:
        with progress.bar(name, total=len(texts), done=0, unit="images") as bar:
            images_NHWC = studio.images(encoder.embed, texts, batch_size=64, bar=bar)
        cells = {name: (s.mean, s.count, s.low, s.high) for name, s in score_images(images_NHWC, texts).items()}
        return ScoredRun(asked=own, parameters=encoder.parameters, scores=cells)

    return scored(None if folder is None else folder / "scored", own, score)


def write_results(table: "Table", groups: Mapping[str, Sequence[Path]], folder: Path, device: str) -> None:
    """table.md, table.json, scaling.png, embeddings.png."""
    from evaluation.encoder_rows import EIGHT_BITS
    from evaluation.leader import TEACHER
    from evaluation.plots import plot_embeddings, plot_scaling
    from evaluation.table import markdown
    from storage_schemas import durable

    folder.mkdir(parents=True, exist_ok=True)
    durable.replace(folder / "table.md", markdown(table).encode())
    durable.replace(folder / "table.json", (table.model_dump_json(indent=1) + "\n").encode())
    plot_scaling(table, folder / "scaling.png", baselines=(TEACHER, EIGHT_BITS))
    plot_embeddings(_embeddings(groups, table, device), folder / "embeddings.png")


def _embeddings(groups: Mapping[str, Sequence[Path]], table: "Table", device: str) -> dict[str, Any]:
    torch_device = quiet_device(device)
    import torch

    from evaluation.encoder_rows import student_row, teacher_row
    from evaluation.leader import TEACHER
    from models.teacher_folder import BUILD_PARTS
    from pocket.world import captions

    teacher = resolve_teacher(POCKET, BUILD_PARTS)
    texts = captions(min(table.captions, 192), seed=table.seed, split="heldout")
    encoders = {TEACHER: teacher_row(teacher, eight_bits=False, dtype=torch.float32, device=torch_device)}
    encoders |= {name: student_row(name, places[0], teacher, device=torch_device) for name, places in groups.items()}
    return {name: encoder.embeddings(texts, torch_device) for name, encoder in encoders.items()}


def print_table(table: "Table", format: str) -> None:
    """Scores as text, Markdown or JSON."""
    from evaluation.table import lines_of, markdown

    (_, _, _, *dimensions), *rows = lines_of(table)
    lines = [["", *dimensions]]
    for name, parameters, runs, *cells in rows:
        several = f", {runs} runs" if runs != "1" else ""
        # An interval below its mean: eight columns fit a terminal of 80.
        lines.append([f"{name}\n{parameters}{several}", *(cell.replace(" (", "\n").rstrip(")") for cell in cells)])
    print_lines(lines, markdown(table), table, format, f"{table.captions} held-out captions, 95 % intervals")


def print_lines(lines: list[list[str]], markdown: str, record: Any, format: str, title: str) -> None:
    """A table in the form that is asked for; `record` is what JSON has."""
    if format == "json":
        print(record.model_dump_json(indent=1))
        return
    if format == "markdown":
        print(markdown, end="")
        return
    shown = RichTable(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    head, *rows = lines
    for heading in head:
        shown.add_column(heading, overflow="fold")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    out.print(shown)
