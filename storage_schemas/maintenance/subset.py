"""Copies some prompts of a cache with all their samples: the same bytes as a cache built from just those prompts."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io.folders import Location
from secondcast.storage_schemas.maintenance.rewrite import Rewritten, Source, rewrite
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.comparing import shortened
from secondcast.storage_schemas.schema.manifest import PromptSet, Segment
from secondcast.storage_schemas.schema.prompts import identity_form, prompt_id
from secondcast.storage_schemas.writer import prompt_set_fields


def subset(
    cache: Cache,
    location: Location,
    progress: Progress,
    *,
    sources: Sequence[str] = (),
    listed: Sequence[str] | None = None,
    count: int | None = None,
) -> Rewritten:
    """Write the first `count` prompts that have any of these sources and are listed (by id or text).

    Raises the errors of `rewrite`, and SettingsError for an unknown source or an empty selection.
    """
    whole = Source(cache)
    numbers = _selected(whole, sources, listed, progress)[:count]
    if cache.negative is not None:
        numbers = [cache.negative, *numbers]
    prompts = [whole.prompts[number] for number in numbers]
    segments = _cut_down(cache.manifest.prompts.segments, numbers)
    planned = sum(segment.prompts * segment.samples_per_prompt for segment in segments)
    trajectories = f", {planned} of {cache.planned} trajectories" if cache.planned else ""
    manifest = cache.manifest.model_copy(update={"prompts": PromptSet(segments=segments, **prompt_set_fields(prompts))})
    progress.say(f"{manifest.own_prompts} of {cache.manifest.own_prompts} prompts{trajectories}")
    return rewrite(location, manifest, prompts, [whole], progress, title="subset")


def _selected(whole: Source, sources: Sequence[str], listed: Sequence[str] | None, progress: Progress) -> list[int]:
    there = whole.cache.manifest.prompts.sources
    folder = whole.cache.folder
    for name in sources:
        if name not in there:
            raise SettingsError(f"--source {name!r} is not in {folder}: its sources are {_counts(there)}")
    wanted = None if listed is None else _numbers(whole, listed, progress)
    numbers = [
        number
        for number, prompt in enumerate(whole.prompts)
        if number != whole.cache.negative
        and (not sources or not set(sources).isdisjoint(prompt.sources))
        and (wanted is None or number in wanted)
    ]
    if not numbers:
        raise SettingsError(
            f"nothing of {folder} is selected: it has {counted(len(whole.prompts), 'prompt')} ({_counts(there)}), the "
            f"first is {whole.prompts[0].id} {shortened(whole.prompts[0].text)}; give other --source or --ids"
        )
    return numbers


def _numbers(whole: Source, listed: Iterable[str], progress: Progress) -> set[int]:
    lines = [line for line in listed if identity_form(line)]
    found = {line: whole.numbers.get(line.strip(), whole.numbers.get(prompt_id(line))) for line in lines}
    unknown = [line for line in lines if found[line] is None]
    if unknown:
        progress.say(
            f"{len(unknown)} of {len(lines)} lines match no prompt of {whole.cache.folder}, the first: {unknown[0]!r}"
        )
    return {number for number in found.values() if number is not None}


def _cut_down(segments: Iterable[Segment], numbers: list[int]) -> tuple[Segment, ...]:
    """The segments restricted to the selected prompts, which stay contiguous; empty segments are dropped."""
    kept = []
    for segment in segments:
        begin = bisect_left(numbers, segment.first_prompt)
        end = bisect_left(numbers, segment.first_prompt + segment.prompts)
        if end > begin:
            kept.append(segment.model_copy(update={"first_prompt": begin, "prompts": end - begin}))
    return tuple(kept)


def _counts(sources: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sources.items())
