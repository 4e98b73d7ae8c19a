"""The paper's table shape: text encoders as rows, dimensions as columns, the teacher first."""

from collections.abc import Mapping, Sequence
from typing import Literal

from evaluation.intervals import wilson
from evaluation.pocket_scores import Score
from storage_schemas.manifest import Record


class Cell(Record):
    """A rate with its 95 % Wilson interval, over so many captions (of all runs of a row)."""

    mean: float
    low: float
    high: float
    count: int


class Row(Record):
    """A text encoder: its parameters, how many runs are pooled (seeds of one student), and a cell by dimension."""

    name: str
    parameters: int
    runs: int = 1
    cells: dict[str, Cell]


class Table(Record):
    """Rows scored alike: the same captions, noise, guidance and sampler steps."""

    captions: int
    steps: int
    guidance: float
    seed: int
    rows: tuple[Row, ...]

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Columns, in the scorer's order."""
        return tuple(self.rows[0].cells)


def row_of(name: str, parameters: int, scores: Sequence[Mapping[str, Score]]) -> Row:
    """The row of a text encoder, from the scores of its runs on the same captions.

    Runs are pooled as if their captions were different ones: where one run's images resemble another's, the interval
    is somewhat narrow.
    """
    cells = {}
    for dimension, first in scores[0].items():
        mean = sum(one[dimension].mean for one in scores) / len(scores)
        count = first.count * len(scores)
        low, high = wilson(min(1.0, mean), count)
        cells[dimension] = Cell(mean=mean, low=low, high=high, count=count)
    return Row(name=name, parameters=parameters, runs=len(scores), cells=cells)


def cell_text(cell: Cell) -> str:
    """As in .93 (.91-.95)."""
    return f"{_short(cell.mean)} ({_short(cell.low)}-{_short(cell.high)})"


def lines_of(table: Table) -> list[list[str]]:
    """The table as text: a head and a line for each row; parameters in millions."""
    head = ["text encoder", "parameters", "runs", *table.dimensions]
    return [
        head,
        *(
            [row.name, _millions(row.parameters), str(row.runs), *(cell_text(cell) for cell in row.cells.values())]
            for row in table.rows
        ),
    ]


def markdown(table: Table) -> str:
    """For a document."""
    caption = (
        f"{table.captions} held-out captions, {table.steps} sampler steps, guidance {table.guidance:g}, "
        f"seed {table.seed}; 95 % Wilson intervals."
    )
    return "\n".join([caption, "", *markdown_lines(lines_of(table))]) + "\n"


def markdown_lines(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, of which the first is its head, as Markdown."""
    head, *rows = ([_escaped(text) for text in line] for line in lines)
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3g} M" if parameters < 1e9 else f"{parameters / 1e9:.2f} B"


def _short(value: float) -> str:
    return f"{value:.2f}".removeprefix("0")


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")


Format = Literal["text", "markdown", "json"]
