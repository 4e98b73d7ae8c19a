"""Captions of LAION-Aesthetics, selected by the aesthetic score in the Parquet files of its metadata.

The authors' script reads such captions from laion_6.5.json in their repository; how many those are is not stated here,
because the file could not be read.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from secondcast.cache_builder.prompts.columns import chosen_column, find_column, text_of
from secondcast.cache_builder.prompts.sources import PromptSource, unknown_key
from secondcast.cache_builder.prompts.tables import dataset_batches, parquet_batches
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.progress import Bar, counted
from secondcast.storage_schemas.schema.prompts import prompt_id

MIN_SCORE = 6.5
"""The least score of LAION-Aesthetics 6.5+."""
SCORE_COLUMNS = ("aesthetic_score", "aesthetic")
"""Columns of the aesthetic score: of version 2 of LAION-Aesthetics, and of version 1."""
_EMPTY = prompt_id("")


@dataclass(kw_only=True)
class LaionCaptions:
    """Captions in the order of the metadata, and the numbers of rows that were read and skipped.

    below: rows with a lower score. unscored: rows without a score. whole: whether the source was read to its end.
    """

    texts: list[str] = field(default_factory=list)
    rows: int = 0
    below: int = 0
    unscored: int = 0
    empty: int = 0
    repeated: int = 0
    whole: bool = True

    @property
    def text(self) -> str:
        """A line about them."""
        skipped = f"{self.below} with a lower score, {self.unscored} without one, {self.empty} empty and "
        read = "" if self.whole else ", the first of the source"
        return f"{counted(self.rows, 'row')}{read} ({skipped}{self.repeated} repeated skipped)"


def laion_captions(source: PromptSource, *, min_score: float, num_prompts: int | None, bar: Bar) -> LaionCaptions:
    """Distinct captions with at least this score, the first `num_prompts` of them.

    Rows are read in batches: memory grows with the captions that are kept, not with the source. Reading stops with the
    last caption. Raises PromptsError for a source that cannot be read or has no such caption.
    """
    found, ids = LaionCaptions(), set[str]()
    for caption, score, where in _scored_rows(source):
        if len(ids) == num_prompts:
            found.whole = False
            break
        found.rows += 1
        text = text_of(caption, where)
        if score is None or math.isnan(score):
            found.unscored += 1
        elif score < min_score:
            found.below += 1
        elif (identity := prompt_id(text)) == _EMPTY:
            found.empty += 1
        elif identity in ids:
            found.repeated += 1
        else:
            ids.add(identity)
            found.texts.append(text)
            bar.advance(1)
    if not found.texts:
        raise PromptsError(
            f"{source.shown} has no caption with a score of at least {min_score:g} in {found.text}: give a lower "
            f"--min-score, or other metadata"
        )
    return found


def _scored_rows(source: PromptSource) -> Iterator[tuple[Any, float | None, str]]:
    """Caption, score and place of each row."""
    for name, batches in _tables(source):
        number = 0
        for batch in batches:
            captions, scores = batch.values()
            for caption, score in zip(captions, scores, strict=True):
                number += 1
                where = f"{name} row {number}"
                if score is not None and not isinstance(score, int | float):
                    raise PromptsError(f"{where} has the score {score!r}, expected a number")
                yield caption, score, where


def _tables(source: PromptSource) -> Iterator[tuple[str, Iterator[dict[str, list[Any]]]]]:
    def choose(found: Sequence[str], name: str) -> list[str]:
        place = next((at for one in SCORE_COLUMNS if (at := find_column(found, one)) is not None), None)
        if place is None:
            raise PromptsError(
                f"{name} has the columns {', '.join(found)} and none of {', '.join(SCORE_COLUMNS)}: expected the "
                f"metadata of LAION-Aesthetics, with a score for each caption"
            )
        return [chosen_column(name, found, source.column), found[place]]

    if source.is_dataset:
        yield source.path, dataset_batches(source, partial(choose, name=source.path), streaming=True)
        return
    for file in _files(source):
        yield file.name, parquet_batches(file, name=str(file), choose=partial(choose, name=str(file)))


def _files(source: PromptSource) -> list[Path]:
    path = Path(source.path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise PromptsError(f"{path} has no .parquet file: expected the metadata of LAION-Aesthetics")
    if not path.exists():
        raise PromptsError(
            f"no {path}: expected a Parquet file, a folder of them, or hf:NAME{unknown_key(source.path)}"
        )
    return files
