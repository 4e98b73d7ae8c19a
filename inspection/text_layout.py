"""Plain text in columns: text is never truncated, and in a pipe each entry is one line."""

import textwrap
from collections.abc import Sequence


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
    table = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    margin = sum(widths[:-1]) + 2 * (len(widths) - 1)
    lines = []
    for row in table:
        *cells, last = _cells(row, widths, text_columns)
        if width is None or margin + len(last.rstrip()) <= width:
            lines.append("  ".join([*cells, last]).rstrip())
            continue
        first, *more = wrapped(last.strip(), width=width - margin)
        lines += ["  ".join([*cells, first]), *(" " * margin + line for line in more)]
    return lines


def _cells(line: Sequence[str], widths: Sequence[int], text_columns: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if number in text_columns else cell.rjust(width)
        for number, (cell, width) in enumerate(zip(line, widths, strict=True))
    ]


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
