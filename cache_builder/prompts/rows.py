"""Rows of a prompt source; selects the reader by file extension and content."""

import io
from collections.abc import Iterator
from pathlib import Path

from secondcast.cache_builder.prompts.bytes import decoded, lines_of, read_source
from secondcast.cache_builder.prompts.columns import Row
from secondcast.cache_builder.prompts.json_rows import JSON_ENDINGS, is_json, json_rows
from secondcast.cache_builder.prompts.separated import TABLE_ENDINGS, header_of_a_table, separated_rows
from secondcast.cache_builder.prompts.sources import PromptSource
from secondcast.cache_builder.prompts.tables import PARQUET_MARK, dataset_rows, parquet_rows
from secondcast.storage_schemas.errors import PromptsError


def source_rows(source: PromptSource) -> Iterator[Row]:
    """All rows of a source in order, including empty ones; PromptsError or MissingExtraError if it cannot be read.

    A file is read once, so that it may be a pipe. JSON and Parquet are recognised by extension or content, tables by
    extension or a requested column; any other file has a prompt per line.
    """
    if source.is_dataset:
        return dataset_rows(source)
    name = source.shown
    if source.ending == ".parquet" and (file := Path(source.path)).is_file():
        return parquet_rows(file, name=name, column=source.column)
    data = read_source(source.path)
    if data.startswith(PARQUET_MARK):
        return parquet_rows(io.BytesIO(data), name=name, column=source.column)
    text = decoded(data, name)
    if source.ending in JSON_ENDINGS or is_json(text):
        return json_rows(text, name=name, column=source.column)
    if source.ending in TABLE_ENDINGS or source.column is not None:
        return separated_rows(text, name=name, ending=source.ending, column=source.column)
    return _text_rows(text, name)


def plain_rows(given: str) -> Iterator[Row]:
    """All rows of a source outside a build; PromptsError for keys that only apply to builds."""
    source = PromptSource.of(given)
    if source.name is not None or source.limit is not None or source.repeat > 1:
        raise PromptsError(f"{given}: name=, limit= and repeat= only apply to builds: omit them")
    return source_rows(source)


def _text_rows(text: str, name: str) -> Iterator[Row]:
    lines = lines_of(text)
    if (column := header_of_a_table(lines[0])) is not None:
        raise PromptsError(
            f"{name} line 1 is {lines[0]!r}, the header of a table: append :column={column} to read that column, or "
            f"insert an empty line before it to read every line as a prompt"
        )
    return (Row(line, f"{name} line {number}") for number, line in enumerate(lines, start=1))
