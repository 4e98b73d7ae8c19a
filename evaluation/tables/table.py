"""The paper's table shape: text encoders as rows, dimensions as columns, the teacher first."""

from collections.abc import Mapping, Sequence
from typing import Literal

from secondcast.evaluation.intervals import clustered, wilson
from secondcast.evaluation.pocket_scores import Score
from secondcast.storage_schemas.progress import counted, size_text
from secondcast.storage_schemas.schema.json_files import Record

Interval = Literal["wilson", "bootstrap", "pooled"]


class Cell(Record):
    """A rate with its 95 % interval over `count` captions (of all runs of a row).

    interval: "wilson" for one run; "bootstrap" over the captions shared by several runs; "pooled": Wilson over all
    captions of all runs, too narrow, used if values by caption are not stored.
    """

    mean: float
    low: float
    high: float
    count: int
    interval: Interval = "wilson"


class Row(Record):
    """A text encoder: its parameters, number of pooled runs (seeds of one student), and a cell per dimension.

    weight_bytes: of its weight files; None for one that has none.
    """

    name: str
    parameters: int
    weight_bytes: int | None = None
    runs: int = 1
    cells: dict[str, Cell]


class Table(Record):
    """Rows scored with the same captions, noise, guidance and sampling steps."""

    captions: int
    steps: int
    guidance: float
    seed: int
    rows: tuple[Row, ...]

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Columns, in the scorer's order."""
        return tuple(self.rows[0].cells)


def row_of(
    name: str, parameters: int, scores: Sequence[Mapping[str, Score]], *, weight_bytes: int | None = None
) -> Row:
    """The row of a text encoder, from the scores of its runs on the same captions."""
    cells = {dimension: _cell([one[dimension] for one in scores]) for dimension in scores[0]}
    return Row(name=name, parameters=parameters, weight_bytes=weight_bytes, runs=len(scores), cells=cells)


def _cell(scores: Sequence[Score]) -> Cell:
    mean = sum(score.mean for score in scores) / len(scores)
    count = sum(score.count for score in scores)
    values = [score.values for score in scores if score.values is not None]
    interval: Interval
    if len(scores) > 1 and len(values) == len(scores):
        (low, high), interval = clustered(values), "bootstrap"
    else:
        (low, high), interval = wilson(min(1.0, mean), count), "wilson" if len(scores) == 1 else "pooled"
    return Cell(mean=mean, low=low, high=high, count=count, interval=interval)


def cell_text(cell: Cell) -> str:
    """Format as .93 (.91-.95)."""
    return f"{_short(cell.mean)} ({_short(cell.low)}-{_short(cell.high)})"


def lines_of(table: Table) -> list[list[str]]:
    """The table as text: a header and a line for each row; parameters in millions."""
    head = ["text encoder", "parameters", "bytes", "runs", *table.dimensions]
    return [head, *([*_about(row), *(cell_text(cell) for cell in row.cells.values())] for row in table.rows)]


def _about(row: Row) -> list[str]:
    stored = "-" if row.weight_bytes is None else size_text(row.weight_bytes)
    return [row.name, millions(row.parameters), stored, str(row.runs)]


def caption(table: Table) -> str:
    """Caption: the common settings of the rows, and the kind of the intervals."""
    kinds = {cell.interval for row in table.rows for cell in row.cells.values()}
    said = [text for kind, text in _INTERVALS.items() if kind in kinds]
    return (
        f"{counted(table.captions, 'held-out caption')}, {counted(table.steps, 'sampling step')}, guidance "
        f"{table.guidance:g}, seed {table.seed}; 95 % intervals: {'; '.join(said)}."
    )


def markdown(table: Table) -> str:
    """The table as Markdown."""
    return "\n".join([caption(table), "", *markdown_lines(lines_of(table))]) + "\n"


def markdown_lines(lines: Sequence[Sequence[str]]) -> list[str]:
    """Format lines of a table, the first one its header, as Markdown."""
    head, *rows = ([_escaped(text) for text in line] for line in lines)
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


_INTERVALS: dict[Interval, str] = {
    "wilson": "Wilson for one run",
    "bootstrap": "bootstrap over captions for several runs",
    "pooled": "Wilson over the captions of all runs (too narrow) where values by caption are not stored",
}


def millions(parameters: int) -> str:
    """Format as 130 M, 4.76 B."""
    return f"{parameters / 1e6:.3g} M" if parameters < 1e9 else f"{parameters / 1e9:.2f} B"


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


Format = Literal["text", "markdown", "json"]
