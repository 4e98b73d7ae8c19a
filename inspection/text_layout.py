"""Plain text in columns: text is never truncated, and in a pipe each entry is one line."""

import textwrap
from collections.abc import Sequence
from io import StringIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from secondcast.storage_schemas.io.printable import printable

# Columns between two columns of a table, and the width of a table in a pipe or a file.
_GAP, _ANY_WIDTH = 2, 100_000


def table_lines(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text_columns: Sequence[int] = (0,),
    width: int | None = None,
) -> list[str]:
    """Format a header and rows in columns; numbers are right-aligned, text_columns left-aligned.

    width: of a terminal, to which the last column is wrapped.
    """
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for number, heading in enumerate(head):
        table.add_column(
            Text(heading),
            justify="left" if number in text_columns else "right",
            no_wrap=number < len(head) - 1,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    out = StringIO()
    Console(file=out, width=_ANY_WIDTH if width is None else width, color_system=None).print(table, crop=False)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def entry_lines(entries: Sequence[tuple[str, str]], *, width: int | None = None) -> list[str]:
    """Format names, right-aligned, and their values, which are wrapped in a terminal of `width` columns."""
    margin = max(len(name) for name, _ in entries) + 2
    lines = []
    for name, value in entries:
        first, *more = wrapped(value, width=None if width is None else width - margin)
        lines += [f"{name:>{margin - 2}}  {first}".rstrip(), *(" " * margin + line for line in more)]
    return lines


def wrapped(text: str, *, width: int | None) -> list[str]:
    """Wrap a text to lines of at most `width` columns without splitting words; one line for None."""
    if width is None:
        return [text]
    lines = textwrap.wrap(
        text, max(width, 20), replace_whitespace=False, break_long_words=False, break_on_hyphens=False
    )
    return lines or [""]
