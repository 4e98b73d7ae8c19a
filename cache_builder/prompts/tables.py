"""Rows of Parquet files and Hugging Face data sets. pyarrow and datasets are optional: the extra `datasets`."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from secondcast.cache_builder.prompts.columns import Row, chosen_column, text_of
from secondcast.cache_builder.prompts.sources import HUB, PromptSource
from secondcast.storage_schemas.errors import MissingExtraError, PromptsError

PARQUET_MARK = b"PAR1"
_INSTALL = "pip install 'secondcast[datasets]'"
_ROWS_AT_ONCE = 1024
_LONGEST_REASON = 200

Choose = Callable[[Sequence[str]], list[str]]
"""Chooses columns by name among those of a table."""


def parquet_rows(file: Path | IO[bytes], *, name: str, column: str | None) -> Iterator[Row]:
    """Rows of one column of a Parquet file; no other column is read."""
    yield from _rows(parquet_batches(file, name=name, choose=lambda found: [chosen_column(name, found, column)]), name)


def parquet_batches(file: Path | IO[bytes], *, name: str, choose: Choose) -> Iterator[dict[str, list[Any]]]:
    """Values of the chosen columns of a Parquet file by column, in batches; no other column is read."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingExtraError(f"{name} is Parquet and pyarrow is not installed: {_INSTALL}") from error
    try:
        table = ParquetFile(file)
        columns = choose(table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
            yield {column: batch.column(column).to_pylist() for column in columns}
    except (ArrowException, OSError) as error:
        raise PromptsError(f"{name} cannot be read as Parquet ({_reason(error)}): expected a whole file") from error


def dataset_rows(source: PromptSource) -> Iterator[Row]:
    """Rows of one column of a data set: from the hub, saved by save_to_disk, or a folder of data files."""
    batches = dataset_batches(source, lambda found: [chosen_column(source.path, found, source.column)])
    yield from _rows(batches, source.path)


def dataset_batches(source: PromptSource, choose: Choose, *, streaming: bool = False) -> Iterator[dict[str, list[Any]]]:
    """Values of the chosen columns of a data set by column, in batches.

    streaming: whether a data set of the hub is read over the network while it is used, without a copy on disk.
    """
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError(f"{source.path} is a data set and datasets is not installed: {_INSTALL}") from error
    datasets.disable_progress_bars()
    for library in (datasets, huggingface_hub):
        library.utils.logging.set_verbosity_error()
    dataset = _split(source, _loaded(source, datasets, streaming=streaming))
    columns = choose(dataset.column_names)
    yield from dataset.select_columns(columns).iter(batch_size=_ROWS_AT_ONCE)


def _rows(batches: Iterator[dict[str, list[Any]]], where: str) -> Iterator[Row]:
    first = 1
    for batch in batches:
        ((column, values),) = batch.items()
        yield from _texts(values, column, where, first)
        first += len(values)


def _loaded(source: PromptSource, datasets: Any, *, streaming: bool) -> Any:
    name = source.path.removeprefix(HUB)
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        where = str(folder) if folder.is_dir() else name
        return datasets.load_dataset(where, source.config, revision=source.revision, streaming=streaming)
    # datasets raises errors of its dependencies: the hub, fsspec, pyarrow, format readers.
    except Exception as error:
        fix = (
            "expected what save_to_disk wrote, or a folder of .parquet, .jsonl or .csv files"
            if folder.is_dir()
            else "no folder has that name; check the name, config= and revision=, and the network"
        )
        raise PromptsError(
            f"{source.path} cannot be loaded ({type(error).__name__}: {_reason(error)}): {fix}"
        ) from error


def _split(source: PromptSource, loaded: Any) -> Any:
    if not isinstance(loaded, dict):
        if source.split is not None:
            raise PromptsError(f"{source.path} has no split {source.split!r}: it has no splits; omit split=")
        return loaded
    there = ", ".join(loaded)
    if source.split is None:
        if len(loaded) != 1:
            raise PromptsError(f"{source.path} has the splits {there}: name one with :split=NAME")
        return next(iter(loaded.values()))
    if source.split not in loaded:
        raise PromptsError(f"{source.path} has no split {source.split!r}: found {there}")
    return loaded[source.split]


def _texts(values: list[Any], column: str, where: str, first: int) -> Iterator[Row]:
    for number, value in enumerate(values, start=first):
        place = f"{where} row {number}"
        yield Row(text_of(value, place, column), place)


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no reason given")[:_LONGEST_REASON].rstrip(".")
