"""The results of `evaluate paper`: a cell for each text encoder and score, or why there is none."""

from typing import Literal

from secondcast.evaluation.image_metrics.metric import MetricName, Scored
from secondcast.evaluation.tables.table import markdown_lines, millions
from secondcast.storage_schemas.progress import size_text
from secondcast.storage_schemas.schema.json_files import Record

_LOWER_IS_BETTER = ("fid", "kid")
NOT_RUN = "\u2020"
"""Marks a column whose metric this project has not run with the published weights."""


class Column(Record):
    """A score of the images of a set of prompts.

    category: one source of the prompts; None: all of them.
    as_published: whether this project has run the metric with the weights that its users have.
    """

    prompts: str
    metric: MetricName
    score: str
    category: str | None = None
    as_published: bool = False

    @property
    def key(self) -> str:
        """Unique name."""
        return " / ".join(part for part in (self.prompts, self.category, self.score) if part is not None)

    @property
    def marks(self) -> str:
        """The direction that is better, and the mark."""
        arrow = "\u2193" if self.score.startswith(_LOWER_IS_BETTER) else "\u2191"
        return arrow if self.as_published else f"{arrow} {NOT_RUN}"


class Cell(Record):
    """A score with its 95 % interval, where it has one; or the reason why it failed.

    parts, missing: of an average, the categories that it has, and those that it lacks.
    """

    mean: float | None = None
    low: float | None = None
    high: float | None = None
    count: int = 0
    model: str | None = None
    revision: str | None = None
    parts: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    failed: str | None = None

    @classmethod
    def of(cls, score: Scored) -> "Cell":
        """The cell of a score."""
        return cls(
            mean=score.mean, low=score.low, high=score.high, count=score.count, model=score.model,
            revision=score.revision, parts=score.parts, missing=tuple(score.missing),
        )  # fmt: skip

    @property
    def mean_text(self) -> str:
        """The mean, or `failed`."""
        return "failed" if self.mean is None else f"{self.mean:.{self._digits}f}"

    @property
    def interval_text(self) -> str:
        """The interval, as 0.912-0.950; empty without one."""
        return "" if self.low is None else f"{self.low:.{self._digits}f}-{self.high:.{self._digits}f}"

    @property
    def text(self) -> str:
        """Both, as 0.931 (0.912-0.950)."""
        return self.mean_text + (f" ({self.interval_text})" if self.interval_text else "")

    @property
    def _digits(self) -> int:
        return 2 if self.mean is not None and abs(self.mean) >= 2 else 3


class PaperRow(Record):
    """A text encoder, with its cells by Column.key.

    parameters, weight_bytes: None if it could not be loaded.
    baseline: whether it is the teacher's, in any form.
    changes: options that differ from those of most rows.
    """

    name: str
    baseline: bool
    changes: str
    parameters: int | None
    weight_bytes: int | None
    cells: dict[str, Cell]


class PaperTable(Record):
    """All results, as in table.json."""

    format: Literal["secondcast-table"] = "secondcast-table"
    created_by: str
    columns: tuple[Column, ...]
    rows: tuple[PaperRow, ...]

    @property
    def titles(self) -> list[str]:
        """Headings of the columns, without the prompts where all columns have the same."""
        one = len({column.prompts for column in self.columns}) == 1
        return [
            f"{column.key.removeprefix(f'{column.prompts} / ') if one else column.key} {column.marks}"
            for column in self.columns
        ]

    @property
    def failures(self) -> list[tuple[str, str, str]]:
        """Row, column and reason of every failed cell."""
        return [
            (row.name, key, cell.failed)
            for row in self.rows
            for key, cell in row.cells.items()
            if cell.failed is not None
        ]


def lines_of(table: PaperTable) -> list[list[str]]:
    """The table as text: a header and a line for each row."""
    head = ["text encoder", "parameters", "bytes", *table.titles]
    return [
        head,
        *([name_of(row), *about(row), *(row.cells[column.key].text for column in table.columns)] for row in table.rows),
    ]


def about(row: PaperRow) -> list[str]:
    """Parameters and bytes of the text encoder."""
    parameters = "-" if row.parameters is None else millions(row.parameters)
    return [parameters, "-" if row.weight_bytes is None else size_text(row.weight_bytes)]


def name_of(row: PaperRow) -> str:
    """The name with what differs, as in `student (steps 4)`."""
    return f"{row.name} ({row.changes})" if row.changes else row.name


def notes(table: PaperTable) -> list[str]:
    """What a reader must know: the intervals, the mark, the failures."""
    found = ["Means, with 95 % intervals over prompts; the noise of an image is the same for every text encoder."]
    averages = {
        f"{column.score} averages {', '.join(cell.parts)}; it lacks {', '.join(cell.missing)}."
        for row in table.rows
        for column in table.columns
        if (cell := row.cells[column.key]).missing
    }
    found += sorted(averages)
    if any(NOT_RUN in column.marks for column in table.columns):
        found.append(
            f"{NOT_RUN} Secondcast's tests run this metric with small random networks only: its developers could not "
            f"download the published weights, so compare a value of the paper before you trust the column."
        )
    reasons: dict[str, list[str]] = {}
    for row, column, reason in table.failures:
        reasons.setdefault(reason, []).append(f"{row}, {column}")
    found += [
        f"failed ({'; '.join(cells[:3])}{' and more' if len(cells) > 3 else ''}): {why}"
        for why, cells in reasons.items()
    ]
    return found


def markdown(table: PaperTable) -> str:
    """The table as Markdown."""
    return "\n\n".join(["\n".join(markdown_lines(lines_of(table))), *notes(table)]) + "\n"
