"""The table of a recipe, from its images and scores to its files."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from secondcast.evaluation.image_metrics.categories import by_category
from secondcast.evaluation.image_metrics.metric import MetricName, Scored
from secondcast.evaluation.tables.paper.encoders import EncoderFacts, encoder_facts
from secondcast.evaluation.tables.paper.making import Making, check_references, make_images, pictures_of, score_images
from secondcast.evaluation.tables.paper.recipe import is_baseline
from secondcast.evaluation.tables.paper.results import Cell, Column, PaperRow, PaperTable, markdown
from secondcast.evaluation.tables.plots import plot_embeddings, plot_scaling
from secondcast.evaluation.tables.table import Cell as PlottedCell
from secondcast.evaluation.tables.table import Row as PlottedRow


def make_table(making: Making) -> tuple[PaperTable, dict[str, EncoderFacts]]:
    """Generate, score, and load each text encoder once; what exists in the folder is taken from there."""
    check_references(making)
    failed = make_images(making)
    scored: dict[str, dict[Column, Cell]] = {row: {} for row in making.recipe.rows}
    reasons: dict[tuple[str, str, MetricName], str] = {}
    for row, prompts, metric, found in score_images(making, failed):
        if isinstance(found, str):
            reasons[row, prompts, metric] = found
        else:
            scored[row] |= dict(_cells(making, row, prompts, metric, found))
    columns = _columns(making, scored, reasons)
    facts = encoder_facts(making)
    rows = [
        PaperRow(
            name=name,
            baseline=is_baseline(row),
            changes=_changes_text(making, name),
            parameters=facts[name].parameters if name in facts else None,
            weight_bytes=facts[name].weight_bytes if name in facts else None,
            cells={column.key: scored[name].get(column) or _failed(reasons, name, column) for column in columns},
        )
        for name, row in making.recipe.rows.items()
    ]
    return PaperTable(created_by=f"secondcast {version('secondcast')}", columns=columns, rows=tuple(rows)), facts


def _cells(
    making: Making, row: str, prompts: str, metric: MetricName, found: list[Scored]
) -> Iterator[tuple[Column, Cell]]:
    """The cells of all images of a set of prompts, then those by category if there are several."""
    for score in found:
        yield _column(making, prompts, metric, score.name), Cell.of(score)
    categories = {name for names in making.prompts[prompts].categories for name in names}
    if len(categories) < 2:
        return
    pictures = pictures_of(making, row, prompts)
    for score in found:
        for category, part in by_category(score, pictures).items():
            yield _column(making, prompts, metric, score.name, category), Cell.of(part)


def _column(making: Making, prompts: str, metric: MetricName, score: str, category: str | None = None) -> Column:
    # The only networks that came with a package.
    run = metric == "pocket" or (metric == "text" and making.recipe.networks.ocr == "rapidocr")
    return Column(prompts=prompts, metric=metric, score=score, category=category, as_published=run)


def _columns(
    making: Making,
    scored: Mapping[str, Mapping[Column, Cell]],
    reasons: Mapping[tuple[str, str, MetricName], str],
) -> tuple[Column, ...]:
    """The columns of any row, in the order of the recipe; a metric that failed everywhere has one for its name."""
    columns = dict.fromkeys(column for cells in scored.values() for column in cells)
    made = {(column.prompts, column.metric) for column in columns}
    for _, prompts, metric in reasons:
        if (prompts, metric) not in made:
            columns[_column(making, prompts, metric, metric)] = None
    asked = [(name, metric) for name, prompts in making.recipe.prompts.items() for metric in prompts.metrics]
    return tuple(sorted(columns, key=lambda column: asked.index((column.prompts, column.metric))))


def _failed(reasons: Mapping[tuple[str, str, MetricName], str], row: str, column: Column) -> Cell:
    return Cell(failed=reasons.get((row, column.prompts, column.metric), "none of its images has this score"))


def table_files(table: PaperTable, facts: Mapping[str, EncoderFacts]) -> dict[str, bytes]:
    """Files of a table by name, without its page."""
    files = {"table.md": markdown(table).encode(), "table.json": (table.model_dump_json(indent=1) + "\n").encode()}
    if (scaling := _scaling(table)) is not None:
        files["scaling.png"] = scaling
    plain = {row.name for row in table.rows if not row.changes}
    embeddings = {name: one.embedding_ND for name, one in facts.items() if name in plain}
    if len(embeddings) > 1:
        files["embeddings.png"] = plot_embeddings(embeddings)
    return files


def _changes_text(making: Making, name: str) -> str:
    changes = making.recipe.changes(name)
    return ", ".join(_change_text(key.replace("_", "-"), value) for key, value in changes.items())


def _change_text(key: str, value: object) -> str:
    if value is None:
        return f"no {key}"
    return f"{key} {value.name if isinstance(value, Path) else value}"


def _scaling(table: PaperTable) -> bytes | None:
    """Score against parameters, for rows that differ in the text encoder alone; None without two students."""
    rows = [row for row in table.rows if not row.changes and row.parameters is not None]
    keys = [column.key for column in table.columns if all(row.cells[column.key].mean is not None for row in rows)]
    rows.sort(key=lambda row: not row.baseline)
    if not keys or sum(not row.baseline for row in rows) < 2:
        return None
    plotted = [
        PlottedRow(name=row.name, parameters=row.parameters or 0, cells={key: _plotted(row.cells[key]) for key in keys})
        for row in rows
    ]
    return plot_scaling(plotted, baselines=[row.name for row in rows if row.baseline])


def _plotted(cell: Cell) -> PlottedCell:
    assert cell.mean is not None
    low, high = (cell.mean if end is None else end for end in (cell.low, cell.high))
    return PlottedCell(mean=cell.mean, low=low, high=high, count=cell.count)
