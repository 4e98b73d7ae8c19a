"""Rows of JSON prompt files: a list of strings or of objects, or one of them per line."""

import json
from collections.abc import Iterator
from typing import Any

from secondcast.cache_builder.prompts.bytes import lines_of
from secondcast.cache_builder.prompts.columns import Row, object_row, text_of
from secondcast.storage_schemas.errors import PromptsError

JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
_NAMES = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
_NOT_JSON = (ValueError, RecursionError)


def is_json(text: str) -> bool:
    """Whether a text is JSON by its content: a list of strings or of objects, or an object as its first line."""
    start = text.lstrip()
    if start.startswith("{"):
        return isinstance(_parsed(_first_line(start)), dict)
    whole = _parsed(text) if start.startswith("[") else None
    return isinstance(whole, list) and bool(whole) and {type(item) for item in whole} in ({str}, {dict})


def json_rows(text: str, *, name: str, column: str | None) -> Iterator[Row]:
    """Rows of a JSON list or of JSON lines, depending on the content; PromptsError for anything else.

    Keys are case-insensitive. The key `source` of an object names its source: a text, a number, or a list of these.
    """
    try:
        whole = json.loads(text)
    except _NOT_JSON as error:
        if text.lstrip().startswith("["):
            raise _not_json(error, name, text) from error
        return _line_rows(text, name, column)
    # A single object on one line counts as JSON lines.
    if isinstance(whole, str | dict) and len(lines_of(text.strip())) == 1:
        return _line_rows(text, name, column)
    return _list_rows(whole, name, column)


def _list_rows(whole: Any, name: str, column: str | None) -> Iterator[Row]:
    if not isinstance(whole, list):
        raise PromptsError(f"{name} is {_kind(whole)}, expected a list of strings or of objects, or one per line")
    kind = dict if whole and isinstance(whole[0], dict) else str
    for number, item in enumerate(whole, start=1):
        if not isinstance(item, kind):
            raise PromptsError(
                f"{name} is a list of {'objects' if kind is dict else 'strings'}, but item {number} is {_kind(item)}: "
                f"expected all strings, or all objects"
            )
    return _item_rows(((f"{name} item {number}", item) for number, item in enumerate(whole, start=1)), column)


def _line_rows(text: str, name: str, column: str | None) -> Iterator[Row]:
    def items() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(lines_of(text), start=1):
            where = f"{name} line {number}"
            try:
                item = json.loads(line) if line.strip() else ""
            except _NOT_JSON as error:
                raise _not_json(error, name, line, number) from error
            if not isinstance(item, str | dict):
                raise PromptsError(f"{where} is {_kind(item)}, expected an object or a string")
            yield where, item

    return _item_rows(items(), column)


def _item_rows(items: Iterator[tuple[str, Any]], column: str | None) -> Iterator[Row]:
    for where, item in items:
        if isinstance(item, str):
            yield Row(text_of(item, where), where)
        else:
            row, column = object_row(item, column, where)
            yield row


def _not_json(error: Exception, name: str, text: str, line: int = 1) -> PromptsError:
    """The error for text that is not JSON, with the position in the file and the reason."""
    where, reason = f"{name} line {line}", str(error)
    if isinstance(error, json.JSONDecodeError):
        before = lines_of(text[: error.pos] + ".")
        where, reason = f"{name} line {line + len(before) - 1} column {len(before[-1])}", error.msg
    return PromptsError(
        f"{where} is not JSON ({reason}): expected a list of strings, or an object or a string per line"
    )


def _first_line(text: str) -> str:
    return lines_of(text.lstrip())[0]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except _NOT_JSON:
        return None


def _kind(value: Any) -> str:
    return _NAMES.get(type(value), "a number")
