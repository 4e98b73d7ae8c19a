"""The table of a recipe, from its images and scores to its files."""

from importlib.metadata import version

from secondcast.evaluation.image_metrics.metric import MetricName, Scored
from secondcast.evaluation.tables.paper.encoders import EncoderFacts, encoder_facts
from secondcast.evaluation.tables.paper.making import Making, make_images, score_images
from secondcast.evaluation.tables.paper.recipe import is_baseline
from secondcast.evaluation.tables.paper.results import Cell, Column, PaperRow, PaperTable, columns_of, markdown
from secondcast.evaluation.tables.plots import plot_embeddings, plot_scaling
from secondcast.evaluation.tables.table import Cell as PlottedCell
from secondcast.evaluation.tables.table import Row as PlottedRow


def make_table(making: Making) -> tuple[PaperTable, dict[str, EncoderFacts]]:
    """Generate, score, and load each text encoder once; what exists in the folder is taken from there."""
    failed = make_images(making)
    scored: dict[str, list[tuple[Column, Cell]]] = {row: [] for row in making.recipe.rows}
    wrong: list[tuple[str, str, MetricName, str]] = []
    for row, prompts, metric, found in score_images(making, failed):
        if isinstance(found, str):
            wrong.append((row, prompts, metric, found))
        else:
            scored[row] += [_cell(prompts, metric, score) for score in found]
    columns = list(columns_of(scored))
    for _, prompts, metric, _ in wrong:
        if not any((column.prompts, column.metric) == (prompts, metric) for column in columns):
            columns.append(Column(prompts=prompts, metric=metric, score=metric))
    order = list(making.recipe.prompts)
    columns.sort(key=lambda column: order.index(column.prompts))
    reasons = {(row, prompts, metric): why for row, prompts, metric, why in wrong}
    facts = encoder_facts(making)
    rows = []
    for name, row in making.recipe.rows.items():
        cells = {column.key: cell for column, cell in scored[name]}
        for column in columns:
            why = reasons.get((name, column.prompts, column.metric), "no image has this score")
            cells.setdefault(column.key, Cell(failed=why))
        rows.append(
            PaperRow(
                name=name,
                baseline=is_baseline(row),
                changes=_changes_text(making, name),
                parameters=facts[name].parameters if name in facts else None,
                weight_bytes=facts[name].weight_bytes if name in facts else None,
                cells=cells,
            )
        )
    table = PaperTable(created_by=f"secondcast {version('secondcast')}", columns=tuple(columns), rows=tuple(rows))
    return table, facts


def table_files(table: PaperTable, facts: dict[str, EncoderFacts]) -> dict[str, bytes]:
    """Files of a table by name, without its page."""
    files = {"table.md": markdown(table).encode(), "table.json": (table.model_dump_json(indent=1) + "\n").encode()}
    if (scaling := _scaling(table)) is not None:
        files["scaling.png"] = scaling
    embeddings = {name: one.embedding_ND for name, one in facts.items() if not _row(table, name).changes}
    if len(embeddings) > 1:
        files["embeddings.png"] = plot_embeddings(embeddings)
    return files


def _cell(prompts: str, metric: MetricName, score: Scored) -> tuple[Column, Cell]:
    return Column(prompts=prompts, metric=metric, score=score.name), Cell.of(score)


def _changes_text(making: Making, name: str) -> str:
    changes = making.recipe.changes(name)
    return ", ".join(f"{key.replace('_', '-')} {value}" for key, value in changes.items())


def _row(table: PaperTable, name: str) -> PaperRow:
    return next(row for row in table.rows if row.name == name)


def _scaling(table: PaperTable) -> bytes | None:
    """Score against parameters, for rows that differ in the text encoder alone; None without two students."""
    rows = [row for row in table.rows if not row.changes or row.baseline]
    keys = [column.key for column in table.columns if all(row.cells[column.key].mean is not None for row in rows)]
    students = [row for row in rows if not row.baseline and row.parameters is not None]
    if not keys or len(students) < 2:
        return None
    baselines = [row for row in rows if row.baseline]
    plotted = [
        PlottedRow(
            name=row.name,
            parameters=row.parameters or 0,
            cells={key: _plotted(row.cells[key]) for key in keys},
        )
        for row in (*baselines, *students)
    ]
    return plot_scaling(plotted, baselines=[row.name for row in baselines])


def _plotted(cell: Cell) -> PlottedCell:
    assert cell.mean is not None
    low, high = (cell.mean if end is None else end for end in (cell.low, cell.high))
    return PlottedCell(mean=cell.mean, low=low, high=high, count=cell.count)
