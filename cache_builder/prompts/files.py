"""Combines the prompts of several sources into one set of distinct texts, each with all its source names."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from secondcast.cache_builder.prompts.rows import source_rows
from secondcast.cache_builder.prompts.sources import PromptSource
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.schema.prompts import prompt_id

# The manifest lists all of them.
MOST_SOURCE_NAMES = 1000
# Also the identity form of a text of white space and zero-width characters.
_EMPTY = prompt_id("")


@dataclass(frozen=True, kw_only=True)
class SourcedText:
    """A distinct prompt text with the names of all its sources, and the largest of their repeats."""

    text: str
    sources: tuple[str, ...]
    repeat: int = 1


@dataclass(frozen=True, kw_only=True)
class SourceCount:
    """Counts of one source: lines = new + empty + repeated + left_out.

    distinct: different prompts of this source.
    new: prompts that no earlier source has.
    repeated: lines whose prompt is in an earlier line of any source.
    left_out: prompts beyond the overall limit.
    ended: whether reading stopped at the source's own limit.
    """

    source: str
    lines: int
    distinct: int
    new: int
    empty: int
    repeated: int
    left_out: int
    ended: bool


@dataclass(frozen=True, kw_only=True)
class PromptsRead:
    """Prompts in build order (larger repeats first, else in order of appearance), with counts per source.

    named: source names that rows or `:name=` state, in contrast to names of files.
    """

    texts: tuple[SourcedText, ...]
    counts: tuple[SourceCount, ...]
    limit: int | None
    named: frozenset[str] = frozenset()

    @property
    def categories(self) -> list[tuple[str, ...]]:
        """The stated source names of each text."""
        return [tuple(name for name in text.sources if name in self.named) for text in self.texts]

    @property
    def empty(self) -> int:
        """Number of empty lines."""
        return sum(count.empty for count in self.counts)

    @property
    def repeated(self) -> int:
        """Number of lines that repeat an earlier prompt."""
        return sum(count.repeated for count in self.counts)

    def skipped_text(self) -> str:
        """A line on the skipped lines, and on the sources that were not read to their end."""
        parts = [f"{self.empty} empty and {self.repeated} repeated lines skipped"]
        if left_out := sum(count.left_out for count in self.counts):
            parts.append(f"{counted(left_out, 'line')} of other prompts skipped by --limit {self.limit}")
        if ended := [f"{count.source}:limit={count.distinct}" for count in self.counts if count.ended]:
            parts.append(f"stopped reading at {', '.join(ended)}")
        return "; ".join(parts)


@dataclass(kw_only=True)
class _Merged:
    """Accumulates the sources of a prompt while they are read."""

    text: str
    names: list[str] = field(default_factory=list)
    repeat: int = 1

    def note(self, names: Sequence[str], repeat: int) -> None:
        """Add a row of this prompt."""
        self.names += [name for name in dict.fromkeys(names) if name not in self.names]
        self.repeat = max(self.repeat, repeat)


def read_prompts(sources: Sequence[PromptSource | Path | str], *, limit: int | None) -> PromptsRead:
    """Read the prompts of all sources; `limit` keeps the first distinct ones.

    Every source is read to its end, or its own limit, even after `limit` is reached, so that a prompt has the names of
    all its sources. Raises PromptsError for a source that cannot be read or has no prompt, MissingExtraError.
    """
    merged: dict[str, _Merged] = {}
    named: set[str] = set()
    counts = tuple(_merge(PromptSource.of(source), merged, limit, named) for source in sources)
    texts = (SourcedText(text=m.text, sources=tuple(m.names), repeat=m.repeat) for m in merged.values())
    # Stable sort: prompts with more samples form one segment, at the front.
    ordered = tuple(sorted(texts, key=lambda text: -text.repeat))
    return PromptsRead(texts=ordered, counts=counts, limit=limit, named=frozenset(named))


def _merge(source: PromptSource, merged: dict[str, _Merged], limit: int | None, named: set[str]) -> SourceCount:
    lines = empty = repeated = left_out = 0
    before = len(merged)
    seen: set[str] = set()
    names: set[str] = set()
    own = (source.source_name,)
    for row in source_rows(source):
        lines += 1
        identity = prompt_id(row.text)
        if identity == _EMPTY:
            empty += 1
            continue
        seen.add(identity)
        if identity in merged:
            repeated += 1
        elif limit is not None and len(merged) == limit:
            left_out += 1
        else:
            merged[identity] = _Merged(text=row.text)
        if identity in merged:
            given = own if source.name is not None else row.sources or own
            merged[identity].note(given, source.repeat)
            names.update(given)
            if source.name is not None or row.sources:
                named.update(given)
        if len(seen) == source.limit:
            break
    _check_read(source, lines, seen, names)
    return SourceCount(
        source=source.path,
        lines=lines,
        distinct=len(seen),
        new=len(merged) - before,
        empty=empty,
        repeated=repeated,
        left_out=left_out,
        ended=len(seen) == source.limit,
    )


def _check_read(source: PromptSource, lines: int, seen: set[str], names: set[str]) -> None:
    if not seen:
        raise PromptsError(
            f"{source.shown} has no prompt ({counted(lines, 'line')}, all empty): expected one prompt per line"
        )
    if len(names) > MOST_SOURCE_NAMES:
        raise PromptsError(
            f"{source.shown} has {len(names)} different source names in its lines, but a cache records at most "
            f"{MOST_SOURCE_NAMES}: give one name for all with :name=NAME"
        )
