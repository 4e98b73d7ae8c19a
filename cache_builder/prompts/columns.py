"""Rows of prompt sources, independent of the format, and the choice of the prompt column."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from secondcast.storage_schemas.errors import PromptsError

DEFAULT_COLUMNS = ("prompt", "text", "caption")
_SOURCE = "source"
# A name with one of these belongs to the header of a table with another separator.
_CUT_WRONGLY = re.compile(r"[,;\t|]")


class Row(NamedTuple):
    """A row of a source.

    text: the prompt as in the source, possibly empty.
    where: file and line, item or row, for messages.
    sources: the source names in the row itself.
    others: the row's other columns that were read, by lower-case name.
    """

    text: str
    where: str
    sources: tuple[str, ...] = ()
    others: Mapping[str, Any] = {}


def same_name(name: str) -> str:
    """Normalise a column name for comparison: stripped, in lower case."""
    return name.strip().casefold()


def find_column(found: Sequence[str], asked: str | None) -> int | None:
    """Index of the requested column, else of the first of the default names; None if there is none.

    Names are compared without case; an exact match takes precedence.
    """
    for name in (asked,) if asked is not None else DEFAULT_COLUMNS:
        for form in (str, same_name):
            names = [form(other) for other in found]
            if form(name) in names:
                return names.index(form(name))
    return None


def chosen_column(where: str, found: Sequence[str], asked: str | None) -> str:
    """The requested column, the first default name, or the only column; PromptsError lists the existing ones."""
    place = find_column(found, asked)
    if place is not None:
        return found[place]
    if asked is None and len(found) == 1 and not _CUT_WRONGLY.search(found[0]):
        return found[0]
    raise no_column(where, found, asked)


def no_column(where: str, found: Sequence[str], asked: str | None) -> PromptsError:
    """The error for a missing requested column, or for no column with a default name."""
    listed = ", ".join(found) or "none"
    if asked is not None:
        return PromptsError(f"{where} has no column {asked!r}: found {listed}")
    return PromptsError(
        f"{where} has the columns {listed} and none of {', '.join(DEFAULT_COLUMNS)}: name one with :column=NAME"
    )


def text_of(value: Any, where: str, column: str | None = None) -> str:
    """A value as text, None as empty; PromptsError if it is not text, or not valid Unicode."""
    if value is None:
        return ""
    place = where if column is None else f"{where}, column {column!r},"
    if not isinstance(value, str):
        raise PromptsError(f"{place} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptsError(
            f"{place} has a lone surrogate (character {error.start + 1}), which is not valid Unicode: correct that line"
        ) from error
    return value


def object_row(item: Mapping[str, Any], column: str | None, where: str) -> tuple[Row, str]:
    """The row of a JSON object and its prompt column, which the next rows share; PromptsError without one."""
    names = list(item)
    if column is None:
        column = chosen_column(where, names, None)
    place = find_column(names, column)
    if place is None:
        raise no_column(where, names, column)
    others = {same_name(name): value for name, value in item.items() if name != names[place]}
    text = text_of(item[names[place]], where, names[place])
    return Row(text, where, _source_names(others.get(_SOURCE), where), others), column


def _source_names(value: Any, where: str) -> tuple[str, ...]:
    """Source names from a text, a number or a list of them; none for any other value (an object, null)."""
    names = []
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str | int | float) and not isinstance(name, bool):
            names.append(text_of(str(name), where, _SOURCE))
    return tuple(name for name in names if name.strip())
