"""Table of students (rows) by distances from the teacher (columns) on the held-out trajectories of a cache."""

from collections.abc import Sequence
from statistics import fmean

from secondcast.evaluation.results import Evaluation
from secondcast.evaluation.tables.aggregates import closed_loop_summary, open_loop_summary
from secondcast.evaluation.tables.table import markdown_lines
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.schema.json_files import Record


class ErrorRow(Record):
    """Means over the runs (seeds) of a student, as fractions of the norms of the velocity and the final latent.

    psnr_db is None if no image differs; the closed-loop fields are None without a closed loop.
    """

    name: str
    runs: int
    records: int
    error_fraction: float
    replay_error_fraction: float | None
    latent_fraction: float | None
    psnr_db: float | None
    ssim: float | None
    by_step: tuple[float, ...]
    replay_error_by_step: tuple[float, ...] | None


class ErrorTable(Record):
    """Rows for the same trajectories and steps."""

    cache: str
    trajectories: int
    steps: tuple[int, ...]
    sigmas: tuple[float, ...]
    rows: tuple[ErrorRow, ...]


def error_row(name: str, evaluations: Sequence[Evaluation]) -> ErrorRow:
    """The row of a student, from the evaluations of its runs."""
    opened = [open_loop_summary(one, hardest=0) for one in evaluations]
    student = [row for one in evaluations for row in closed_loop_summary(one) if row["text_encoder"] == "student"]
    psnr = [row["psnr_db"] for row in student if row["psnr_db"] is not None]
    replay_errors = [row["replay_error_fraction"] for row in opened[0]["by_step"]]
    return ErrorRow(
        name=name,
        runs=len(evaluations),
        records=sum(one["overall"]["records"] for one in opened),
        error_fraction=fmean(one["overall"]["error_fraction"] for one in opened),
        replay_error_fraction=opened[0]["overall"]["replay_error_fraction"],
        latent_fraction=fmean(row["latent_fraction"] for row in student) if student else None,
        psnr_db=fmean(psnr) if psnr else None,
        ssim=fmean(row["ssim"] for row in student) if student else None,
        by_step=tuple(fmean(values) for values in zip(*map(_by_step, opened), strict=True)),
        replay_error_by_step=None if None in replay_errors else tuple(replay_errors),
    )


def error_table(rows: Sequence[tuple[str, Sequence[Evaluation]]]) -> ErrorTable:
    """The table of students by name, each with its runs."""
    first = rows[0][1][0]
    return ErrorTable(
        cache=first.cache,
        trajectories=len(first.trajectories),
        steps=first.steps,
        sigmas=first.sigmas,
        rows=tuple(error_row(name, evaluations) for name, evaluations in rows),
    )


def error_lines(table: ErrorTable) -> list[list[str]]:
    """The table as text: a header and a line for each row."""
    head = ["text encoder", "runs", "error", "replay_error", "latent", "PSNR, dB", "SSIM"]
    return [head, *([row.name, str(row.runs), *_cells(row)] for row in table.rows)]


def error_caption(table: ErrorTable) -> str:
    """Caption: the common settings of the rows, and the meaning of the columns."""
    return (
        f"{counted(table.trajectories, 'held-out trajectory')} of {table.cache}, {counted(len(table.steps), 'step')} "
        f"of each. error: error of the prediction / norm of the velocity; replay_error: the same with the teacher's "
        f"embedding; latent: error of the final latent sampled with the student."
    )


def error_markdown(table: ErrorTable) -> str:
    """The table as Markdown."""
    return "\n".join([error_caption(table), "", *markdown_lines(error_lines(table))]) + "\n"


def curves(table: ErrorTable) -> dict[str, Sequence[float]]:
    """Errors by step, by name, with the replay error unless it is exactly zero."""
    found: dict[str, Sequence[float]] = {row.name: row.by_step for row in table.rows}
    replay_error = table.rows[0].replay_error_by_step
    return found | ({"replay_error": replay_error} if replay_error is not None and any(replay_error) else {})


def _cells(row: ErrorRow) -> list[str]:
    return [
        _percent(row.error_fraction),
        _percent(row.replay_error_fraction),
        _percent(row.latent_fraction),
        "-" if row.psnr_db is None else f"{row.psnr_db:.2f}",
        "-" if row.ssim is None else f"{row.ssim:.4f}",
    ]


def _by_step(opened: dict[str, object]) -> list[float]:
    rows = opened["by_step"]
    assert isinstance(rows, list)
    return [row["error_fraction"] for row in rows]


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"
