"""The rows of prompt files, by their ending: text, JSON, JSONL, CSV and TSV; others are in prompt_tables."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from secondcast.cache_builder.prompts.sources import PromptSource, unknown_key
from secondcast.storage_schemas.errors import BadPrompts

DEFAULT_COLUMNS = ("prompt", "text", "caption")
SOURCE_KEY = "source"


class Row(NamedTuple):
    """The text of a row as it stands there, and the source name that the row itself gives, if it does."""

    text: str
    source: str | None = None


def source_rows(source: PromptSource) -> Iterator[Row]:
    """All rows of a source, in order, empty ones too; BadPrompts or MissingExtra says why it cannot be read."""
    if source.is_dataset or source.ending == ".parquet":
        from secondcast.cache_builder.prompts.tables import dataset_rows, parquet_rows

        return dataset_rows(source) if source.is_dataset else parquet_rows(source, existing_file(source))
    text = _decoded(existing_file(source))
    if source.ending == ".json":
        return _json_rows(source, text)
    if source.ending == ".jsonl":
        return _jsonl_rows(source, text)
    if source.ending in (".csv", ".tsv"):
        return _csv_rows(source, text)
    return (Row(line) for line in _lines(text))


def existing_file(source: PromptSource) -> Path:
    """The path of a source that is a file; BadPrompts otherwise."""
    file = Path(source.path).expanduser()
    if file.is_dir():
        raise BadPrompts(
            f"{file} is a folder, expected a file: `secondcast prompts compbench {file} FILE.jsonl` makes one of a "
            f"T2I-CompBench folder, and the folder of a Hugging Face data set is given as hf:{file}"
        )
    if not file.is_file():
        raise BadPrompts(
            f"no prompt file {file}: expected a text file (a prompt per line), .json, .jsonl, .csv, .tsv or .parquet, "
            f"or hf:NAME{unknown_key(source.path)}"
        )
    return file


def chosen_column(where: str, found: Sequence[str], asked: str | None) -> str:
    """The column that was asked for, the only one, or the first of the usual names; BadPrompts lists those there."""
    listed = ", ".join(found)
    if asked is not None:
        if asked not in found:
            raise BadPrompts(f"{where} has no column {asked!r}: found {listed}")
        return asked
    if len(found) == 1:
        return found[0]
    for name in DEFAULT_COLUMNS:
        if name in found:
            return name
    raise BadPrompts(
        f"{where} has the columns {listed} and none of {', '.join(DEFAULT_COLUMNS)}: name one by :column=NAME"
    )


def text_of(value: Any, where: str) -> str:
    """A value as text, none as empty; BadPrompts for what is no text, or cannot be stored as UTF-8."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadPrompts(f"{where} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadPrompts(
            f"{where} has half of a surrogate pair (character {error.start}): no valid Unicode, mend that line"
        ) from error
    return value


def _decoded(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadPrompts(f"{file} cannot be read ({error.strerror}): make it readable") from error
    if not data.strip():
        raise BadPrompts(f"{file} is empty: expected one prompt per line, or a JSON list of strings")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadPrompts(
            f"{file} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): expected one prompt per "
            f"line; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise BadPrompts(f"{file} is a binary file (it has a zero byte): expected one prompt per line")
    return text


def _lines(text: str) -> list[str]:
    # Not splitlines: a prompt may hold a form feed or a Unicode line separator.
    return text.removesuffix("\n").split("\n")


def _json_rows(source: PromptSource, text: str) -> Iterator[Row]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadPrompts(f"{source.path} is not JSON ({error}): expected a list of strings") from error
    if not isinstance(items, list):
        raise BadPrompts(f"{source.path} holds {type(items).__name__}, expected a list of strings or of objects")
    kinds = {type(item) for item in items}
    if not kinds <= {str} and not kinds <= {dict}:
        wrong = next(i for i, item in enumerate(items) if not isinstance(item, str if str in kinds else dict))
        raise BadPrompts(
            f"{source.path} holds a list with other than strings (item {wrong + 1} is {type(items[wrong]).__name__}): "
            f"expected all strings, or all objects"
        )
    return _item_rows(source, ((f"{source.path} item {i + 1}", item) for i, item in enumerate(items)), named=False)


def _jsonl_rows(source: PromptSource, text: str) -> Iterator[Row]:
    def items() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(_lines(text), start=1):
            where = f"{source.path} line {number}"
            try:
                item = json.loads(line) if line.strip() else ""
            except (ValueError, RecursionError) as error:
                raise BadPrompts(f"{where} is not JSON ({error}): expected an object or a string per line") from error
            if not isinstance(item, str | dict):
                raise BadPrompts(f"{where} is {type(item).__name__}, expected an object or a string")
            yield where, item

    return _item_rows(source, items(), named=True)


def _item_rows(source: PromptSource, items: Iterator[tuple[str, Any]], *, named: bool) -> Iterator[Row]:
    column = None
    for where, item in items:
        if isinstance(item, str):
            yield Row(text_of(item, where))
            continue
        column = column or chosen_column(where, list(item), source.column)
        if column not in item:
            raise BadPrompts(f"{where} has no column {column!r}: found {', '.join(item) or 'none'}")
        yield Row(text_of(item[column], f"{column!r} of {where}"), _source_name(item, where) if named else None)


def _source_name(item: dict[str, Any], where: str) -> str | None:
    return text_of(item.get(SOURCE_KEY), f"{SOURCE_KEY!r} of {where}") or None


def _csv_rows(source: PromptSource, text: str) -> Iterator[Row]:
    reader = csv.reader(
        io.StringIO(text, newline=""), dialect="excel-tab" if source.ending == ".tsv" else "excel", strict=True
    )
    header: list[str] = []
    column = 0
    try:
        for cells in reader:
            where = f"{source.path} line {reader.line_num}"
            if not header:
                header, column = cells, _header_column(source, cells) if cells else 0
            elif not cells:
                yield Row("")
            elif len(cells) != len(header):
                raise BadPrompts(
                    f"{where} has {len(cells)} columns, its header {len(header)} ({', '.join(header)}): put a text "
                    f"with a separator in it into double quotes"
                )
            else:
                yield Row(cells[column])
    except csv.Error as error:
        raise BadPrompts(f"{source.path} line {reader.line_num} is not CSV ({error}): mend that line") from error


def _header_column(source: PromptSource, header: list[str]) -> int:
    where = f"{source.path} line 1"
    if source.column is None and len(header) == 1 and " " in header[0].strip():
        raise BadPrompts(
            f"{where} is {header[0]!r}, expected a header such as prompt: add one, name it by :column=, or call the "
            f"file .txt"
        )
    if len(set(header)) < len(header):
        raise BadPrompts(f"{where} names a column twice ({', '.join(header)}): expected a header of different names")
    return header.index(chosen_column(where, header, source.column))
