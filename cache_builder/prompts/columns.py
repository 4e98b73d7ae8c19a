"""A row of a prompt source, whatever the format, and which of its columns holds the prompt."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from secondcast.storage_schemas.errors import PromptsError

DEFAULT_COLUMNS = ("prompt", "text", "caption")
_SOURCE = "source"
# A name with one of these is the header of a table that was cut at another separator.
_CUT_WRONGLY = re.compile(r"[,;\t|]")


class Row(NamedTuple):
    """A row of a source.

    text: the prompt as it is in the source, perhaps empty.
    where: file and line, item or row, for messages.
    sources: the source names that the row itself gives.
    others: the row's other columns that were read, by their names in small letters.
    """

    text: str
    where: str
    sources: tuple[str, ...] = ()
    others: Mapping[str, Any] = {}


def same_name(name: str) -> str:
    """A column name as it is compared: without outer white space, in small letters."""
    return name.strip().casefold()


def find_column(found: Sequence[str], asked: str | None) -> int | None:
    """The place of the column that was asked for, else of the first of the usual names; None where there is none.

    Names are compared in small letters; one that is the same in every letter goes first.
    """
    for name in (asked,) if asked is not None else DEFAULT_COLUMNS:
        for form in (str, same_name):
            names = [form(other) for other in found]
            if form(name) in names:
                return names.index(form(name))
    return None


def chosen_column(where: str, found: Sequence[str], asked: str | None) -> str:
    """The column that was asked for, the first of the usual names, or the only one; PromptsError lists those there."""
    place = find_column(found, asked)
    if place is not None:
        return found[place]
    if asked is None and len(found) == 1 and not _CUT_WRONGLY.search(found[0]):
        return found[0]
    raise no_column(where, found, asked)


def no_column(where: str, found: Sequence[str], asked: str | None) -> PromptsError:
    """The error that the column that was asked for, or any of the usual names, is not there."""
    listed = ", ".join(found) or "none"
    if asked is not None:
        return PromptsError(f"{where} has no column {asked!r}: found {listed}")
    return PromptsError(
        f"{where} has the columns {listed} and none of {', '.join(DEFAULT_COLUMNS)}: name one by :column=NAME"
    )


def text_of(value: Any, where: str, column: str | None = None) -> str:
    """A value as text, none as empty; PromptsError for what is no text, or cannot be stored as UTF-8."""
    if value is None:
        return ""
    place = where if column is None else f"{where}, column {column!r},"
    if not isinstance(value, str):
        raise PromptsError(f"{place} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PromptsError(
            f"{place} has half of a surrogate pair (character {error.start + 1}), which is not valid Unicode: correct "
            f"that line"
        ) from error
    return value


def object_row(item: Mapping[str, Any], column: str | None, where: str) -> tuple[Row, str]:
    """The row of a JSON object, and the column of its prompt, which the next rows have too. PromptsError without it."""
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
    """Texts and numbers, and lists of them, name sources; any other value (an object, null) names none."""
    names = []
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str | int | float) and not isinstance(name, bool):
            names.append(text_of(str(name), where, _SOURCE))
    return tuple(name for name in names if name.strip())
