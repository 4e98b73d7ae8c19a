"""Prompts of several sources as one set: distinct texts, each with all its source names."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from secondcast.cache_builder.prompts.rows import source_rows
from secondcast.cache_builder.prompts.sources import PromptSource
from secondcast.storage_schemas.errors import PromptsError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.schema.prompts import prompt_id

# The manifest lists them all.
MOST_SOURCE_NAMES = 1000
# Of a text of white space and zero-width characters alone, too.
_EMPTY = prompt_id("")


@dataclass(frozen=True, kw_only=True)
class SourcedText:
    """A distinct prompt text with the names of all sources it came from, and the largest of their repeats."""

    text: str
    sources: tuple[str, ...]
    repeat: int = 1


@dataclass(frozen=True, kw_only=True)
class SourceCount:
    """What one source holds: lines = new + empty + repeated + left_out.

    distinct: different prompts of this source; new: those that no earlier source has; repeated: lines whose prompt
    stood in an earlier line of any source; left_out: prompts beyond the limit of all; ended: by its own limit, after
    which nothing was read.
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
    """What was read, in the order of a build: larger repeats first, else as first seen; and a count per source."""

    texts: tuple[SourcedText, ...]
    counts: tuple[SourceCount, ...]
    limit: int | None

    @property
    def empty(self) -> int:
        """Empty lines."""
        return sum(count.empty for count in self.counts)

    @property
    def repeated(self) -> int:
        """Lines that repeat a prompt that was taken."""
        return sum(count.repeated for count in self.counts)

    def skipped_text(self) -> str:
        """What of the sources is not among the texts, and how far they were read."""
        parts = [f"{self.empty} empty and {self.repeated} repeated lines skipped"]
        if left_out := sum(count.left_out for count in self.counts):
            parts.append(f"{counted(left_out, 'line')} of other prompts left out by --limit {self.limit}")
        if ended := [f"{count.source}:limit={count.distinct}" for count in self.counts if count.ended]:
            parts.append(f"read no further than {', '.join(ended)}")
        return "; ".join(parts)


@dataclass(kw_only=True)
class _Merged:
    """A prompt while its sources are read."""

    text: str
    names: list[str] = field(default_factory=list)
    repeat: int = 1

    def note(self, names: Sequence[str], repeat: int) -> None:
        """A row of it in a source."""
        self.names += [name for name in dict.fromkeys(names) if name not in self.names]
        self.repeat = max(self.repeat, repeat)


def read_prompts(sources: Sequence[PromptSource | Path | str], *, limit: int | None) -> PromptsRead:
    """Read prompts of sources; `limit` keeps the first that many distinct prompts of all.

    Sources are read to their end, or their own limit, also where `limit` is reached before: a prompt that is kept has
    the names of all sources it stands in. Raises PromptsError for what cannot be read or holds no prompt, MissingExtraError.
    """
    merged: dict[str, _Merged] = {}
    counts = tuple(_merge(PromptSource.of(source), merged, limit) for source in sources)
    texts = (SourcedText(text=m.text, sources=tuple(m.names), repeat=m.repeat) for m in merged.values())
    # Stable: prompts with more replicas are one segment, and come first.
    return PromptsRead(texts=tuple(sorted(texts, key=lambda text: -text.repeat)), counts=counts, limit=limit)


def _merge(source: PromptSource, merged: dict[str, _Merged], limit: int | None) -> SourceCount:
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
            f"{source.shown} holds no prompt ({counted(lines, 'line')}, all empty): expected one prompt per line"
        )
    if len(names) > MOST_SOURCE_NAMES:
        raise PromptsError(
            f"{source.shown} has {len(names)} different source names in its lines, at most {MOST_SOURCE_NAMES} are "
            f"kept with a cache: give one name for all by :name=NAME"
        )
