"""Merges caches with the same teacher and sampling; of duplicates, the first cache's is kept."""

from collections.abc import Sequence

from secondcast.storage_schemas.errors import SettingsError, SettingsMismatchError
from secondcast.storage_schemas.io.folders import Location
from secondcast.storage_schemas.maintenance.rewrite import Rewritten, Source, rewrite
from secondcast.storage_schemas.progress import Progress, counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.comparing import consequence, differing_fields
from secondcast.storage_schemas.schema.first_difference import first_difference
from secondcast.storage_schemas.schema.layout import Layout
from secondcast.storage_schemas.schema.manifest import PromptSet, Segment
from secondcast.storage_schemas.schema.prompts import Prompt
from secondcast.storage_schemas.schema.segments import added_segments, samples_per_prompt_of
from secondcast.storage_schemas.writer import prompt_set_fields

# Rounded or dropped data cannot be restored: the other cache has to be converted.
_LOSSY = {("compression", "int8"), ("embeddings", "none")}


def merge(caches: Sequence[Cache], location: Location, progress: Progress) -> Rewritten:
    """Write the trajectories of all caches at `location`; report N and the number of duplicates before starting.

    Raises the errors of `rewrite`, SettingsError for fewer than two caches, SettingsMismatchError for different
    teachers or sampling.
    """
    if len(caches) < 2:
        raise SettingsError(
            f"merge has {counted(len(caches), 'cache')}, expected two or more and the target: A B ... TARGET"
        )
    for other in caches[1:]:
        check_can_merge(caches[0], other)
    sources = [Source(cache) for cache in caches]
    prompts = merged_prompts(sources)
    segments = merged_segments(sources, prompts)
    layout = Layout(segments)
    manifest = caches[0].manifest.model_copy(
        update={"prompts": PromptSet(segments=segments, **prompt_set_fields(prompts))}
    )
    of_prompts = counted(manifest.own_prompts, "prompt")
    what = f"{counted(len(layout), 'trajectory')} of {of_prompts}" if len(layout) else of_prompts
    dropped = sum(cache.layout.rows[1].items for cache in caches) - layout.rows[1].items
    progress.say(f"{what} from {counted(len(caches), 'cache')} ({counted(dropped, 'duplicate')} dropped)")
    return rewrite(location, manifest, prompts, sources, progress, title="merge")


def check_can_merge(first: Cache, other: Cache) -> None:
    """Raise SettingsMismatchError if teachers or sampling differ, naming the first field, both values and the fix."""
    if first.manifest.is_text != other.manifest.is_text:
        text, full = (first, other) if first.manifest.is_text else (other, first)
        raise SettingsMismatchError(
            f"{text.folder} is a text cache and {full.folder} has trajectories: the two kinds cannot be merged; give "
            f"both to `secondcast train`, each by its own --cache"
        )
    for field, was, now in differing_fields(first.manifest, other.manifest):
        if not field.startswith("prompts"):
            found = first_difference(was, now, field)
            raise SettingsMismatchError(
                f"{first.folder} has {found.path} = {found.one}, {other.folder} has {found.other}: "
                f"{consequence(field)}; {_fix(field, first, other, was, now)}"
            )


def _fix(field: str, first: Cache, other: Cache, was: str, now: str) -> str:
    if not field.startswith(("sampling.storage.", "text.storage.")):
        return "give caches of one teacher that were built with the same options"
    name = field.split(".")[-1]
    cache, value = (first, now) if (name, now) in _LOSSY else (other, was)
    latents = " --latents stored" if value == "int8" else ""
    flag = "--no-store-embeddings" if (name, value) == ("embeddings", "none") else f"--{name} {value}"
    return f"`secondcast convert {cache.folder} NEW {flag}{latents}`, then merge NEW"


def merged_prompts(sources: Sequence[Source]) -> list[Prompt]:
    """The first cache's prompts in order, then the new ones of each further cache, with the union of source names.

    Raises SettingsMismatchError for a prompt whose spellings in two caches are different to the teacher.
    """
    merged: dict[str, Prompt] = {}
    for source in sources:
        for prompt in source.prompts:
            known = merged.get(prompt.id)
            if known is None:
                merged[prompt.id] = prompt
                continue
            _check_same_text(known, prompt, source.cache)
            names = tuple(dict.fromkeys((*known.sources, *prompt.sources)))
            merged[prompt.id] = Prompt(id=known.id, text=known.text, sources=names, token_ids=known.token_ids)
    return list(merged.values())


def _check_same_text(known: Prompt, prompt: Prompt, cache: Cache) -> None:
    """Raise SettingsMismatchError if a prompt was recorded in two spellings with different embeddings."""
    if known.text == prompt.text:
        return
    # CLIP, whose vector is stored with `pooled` clip, does not use the recorded tokens.
    if known.token_ids != prompt.token_ids or cache.manifest.teacher.pooled == "clip":
        texts = first_difference(prompt.text, known.text, "text")
        raise SettingsMismatchError(
            f"prompt {prompt.id} is {texts.one} in {cache.folder} and {texts.other} in an "
            f"earlier cache: one embedding would be stored for trajectories sampled with two; remove the prompt from "
            f"one of them with `secondcast subset`"
        )


def merged_segments(sources: Sequence[Source], prompts: Sequence[Prompt]) -> tuple[Segment, ...]:
    """The first cache's segments, then what each further cache adds, with that cache's shard size."""
    numbers = {prompt.id: number for number, prompt in enumerate(prompts)}
    segments = list(sources[0].cache.manifest.prompts.segments)
    size, text = segments[0].shard_size, sources[0].cache.manifest.is_text
    have = _samples_per_prompt(sources[0], numbers)
    for source in sources[1:]:
        found = _samples_per_prompt(source, numbers)
        segments += added_segments(have, found, shard_size=size, text=text)
        have = {number: have.get(number, 0) | found.get(number, 0) for number in have | found}
    return tuple(segments)


def _samples_per_prompt(source: Source, numbers: dict[str, int]) -> dict[int, int]:
    """Planned samples (as bits), by new prompt number."""
    found = samples_per_prompt_of(source.cache.manifest.prompts.segments)
    return {numbers[source.prompts[number].id]: bits for number, bits in found.items()}
