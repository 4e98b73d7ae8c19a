"""Rows of text tables (CSV, TSV and similar) with any of four column separators."""

import csv
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

from secondcast.cache_builder.prompts.columns import DEFAULT_COLUMNS, Row, find_column, no_column, same_name
from secondcast.storage_schemas.errors import PromptsError

TABLE_ENDINGS = (".csv", ".tsv")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# A table of one column has no separator; no text has a zero byte.
_NO_SEPARATOR = "\0"
_HEADER_LENGTH = 2**20


class _Record(NamedTuple):
    line: int
    cells: list[str]


class _Header(NamedTuple):
    line: int
    names: list[str]
    place: int
    separator: str


def separated_rows(text: str, *, name: str, ending: str, column: str | None) -> Iterator[Row]:
    r"""Rows of a table whose header has the requested column, or one of the default names, in any case.

    The separator is the one of comma, semicolon, tab and bar with which the header has that column. A header without
    any of them is a single column, which only tabs in a .tsv split.

    Quotes: with commas and semicolons a cell that begins with a quote is quoted ("" inside is one quote), as in
    RFC 4180. With tabs and bars many files do not quote, and a cell "OPEN" includes its quotes. There cells are quoted
    only if the file is valid as a quoted table (every quote is closed at the end of its cell, every row has as many
    cells as the header) and shows signs of quoting: it is invalid without quoting, or its header is quoted, or a
    quoted cell has "". In all other files quotes are content; a file whose rows would begin at other lines with
    quoting is refused as ambiguous.

    Raises PromptsError, with the line, for an invalid header or row.
    """
    header = _header(text, name, ending, column)
    quoted = _is_quoted(text, header, name)
    return _rows(_records(text, header.separator, name, quoted=quoted), header, name)


def header_of_a_table(line: str) -> str | None:
    """The default column name that makes a line look like a table header; None if it does not."""
    for separator in (*_SEPARATORS, _NO_SEPARATOR):
        cells = [cell.removeprefix('"').removesuffix('"') for cell in line.split(separator)]
        if all(cell == cell.strip() for cell in cells) and (place := find_column(cells, None)) is not None:
            return cells[place]
    return None


def _header(text: str, name: str, ending: str, column: str | None) -> _Header:
    headers = {separator: _first_record(text, separator, name) for separator in _SEPARATORS}
    places = {separator: find_column(record.cells, column) for separator, record in headers.items()}
    fitting = {separator: place for separator, place in places.items() if place is not None}
    most = max(_SEPARATORS, key=lambda separator: len(headers[separator].cells))
    where = f"{name} line {headers[most].line}"
    if not fitting:
        names = [cell.strip() for cell in headers[most].cells]
        if column is None and len(names) == 1:
            raise PromptsError(
                f"{where} is {names[0]!r}, expected a header with one of {', '.join(DEFAULT_COLUMNS)}: add one, name "
                f"the column with :column=, or rename the file to .txt"
            )
        raise no_column(where, names, column)
    separator, place = next(iter(fitting.items()))
    names = headers[separator].cells
    if len(headers[most].cells) == 1:
        return _Header(headers[most].line, names, place, "\t" if ending == ".tsv" else _NO_SEPARATOR)
    if len(fitting) > 1:
        raise PromptsError(
            f"{where} has a prompt column whether split at {' or at '.join(_SEPARATORS[s] for s in fitting)}: expected "
            f"a header with one separator"
        )
    if names.count(names[place]) > 1:
        raise PromptsError(f"{where} has a column twice ({', '.join(names)}): expected one column {names[place]!r}")
    return _Header(headers[separator].line, names, place, separator)


def _first_record(text: str, separator: str, name: str, *, quoted: bool = True) -> _Record:
    records = _records(text[:_HEADER_LENGTH], separator, name, quoted=quoted)
    try:
        return next((record for record in records if any(map(str.strip, record.cells))), _Record(1, [""]))
    except PromptsError:
        if not quoted:
            raise
        # A cell begins with a quote that is never closed: the quote is content.
        return _first_record(text, separator, name, quoted=False)


def _is_quoted(text: str, header: _Header, name: str) -> bool:
    separator = header.separator
    if separator not in ("\t", "|"):
        return True
    starts = re.compile(rf'(?:\A|[\r\n{re.escape(separator)}])"')
    if not starts.search(text):
        return False
    as_quoted, as_content = (_misfit(text, header, name, quoted=quoted) for quoted in (True, False))
    if as_quoted is not None:
        # If neither reading fits, report the error of the one that gets further.
        return as_content is not None and as_quoted > as_content
    if as_content is not None or _first_record(text, separator, name, quoted=False).cells[header.place][:1] == '"':
        return True
    cells = (cell for record in _records(text, separator, name, quoted=False) for cell in record.cells)
    # Also for an empty text: a writer that quotes only where necessary writes a single empty cell so.
    if any(cell.startswith('"') and '""' in cell for cell in cells):
        return True
    _check_same_lines(text, separator, name)
    return False


def _check_same_lines(text: str, separator: str, name: str) -> None:
    begun = {record.line for record in _records(text, separator, name, quoted=True)}
    for record in _records(text, separator, name, quoted=False):
        if record.line not in begun:
            raise PromptsError(
                f"{name} line {record.line} is ambiguous: it begins a row, or continues a quoted text of several "
                f'lines; write a quote in a quoted text as "", or save the prompts as JSON lines'
            )


def _misfit(text: str, header: _Header, name: str, *, quoted: bool) -> int | None:
    """The line up to which the text is a valid table, quoted or not; None if it is valid to its end."""
    line = 0
    try:
        for record in _records(text, header.separator, name, quoted=quoted):
            _check_cells(record, header, name)
            line = record.line
    except PromptsError:
        return line
    return None


def _rows(records: Iterator[_Record], header: _Header, name: str) -> Iterator[Row]:
    names = [same_name(other) for other in header.names]
    for record in records:
        if record.line <= header.line:
            continue
        where = f"{name} line {record.line}"
        if not record.cells:
            yield Row("", where)
            continue
        _check_cells(record, header, name)
        if [same_name(cell) for cell in record.cells] == names:
            raise PromptsError(
                f"{where} repeats the header ({', '.join(record.cells)}): files were concatenated; remove that line"
            )
        others = dict(zip(names, record.cells, strict=True))
        del others[names[header.place]]
        yield Row(record.cells[header.place], where, others=others)


def _check_cells(record: _Record, header: _Header, name: str) -> None:
    if record.cells and len(record.cells) != len(header.names):
        raise PromptsError(
            f"{name} line {record.line} has {len(record.cells)} column{'s' if len(record.cells) > 1 else ''}, its "
            f"header {len(header.names)} ({', '.join(header.names)}): put a text with a separator in it into double "
            f"quotes"
        )


def _records(text: str, separator: str, name: str, *, quoted: bool) -> Iterator[_Record]:
    """Records with the line on which each begins; PromptsError if a quote is not closed at the end of a cell."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
    )
    line = 1
    try:
        for cells in reader:
            yield _Record(line, cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise PromptsError(
            f"{name} line {line} cannot be split into columns ({error}): close each quote, and write a quote in a "
            f'quoted text as ""'
        ) from error
