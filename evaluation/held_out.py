"""Held-out trajectories of a cache, and a deterministic choice among them."""

from collections.abc import Sequence
from dataclasses import dataclass

from secondcast.models.noise import draw_guidance
from secondcast.storage_schemas.errors import NotInCacheError
from secondcast.storage_schemas.progress import counted
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.record import trajectory_key
from secondcast.storage_schemas.schema.prompts import HELD_OUT_EVERY


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A trajectory whose prompt is never used in training: its index, its prompt's number, and its attributes.

    guidance: None where the backbone takes none.
    """

    index: int
    key: str
    prompt: int
    text: str
    sources: tuple[str, ...]
    guidance: float | None


def held_out_trajectories(cache: Cache) -> list[HeldOut]:
    """All committed held-out trajectories, by index; NotInCacheError if there are none."""
    prompts = {number: prompt for number, prompt in enumerate(cache.prompts) if prompt.held_out}
    sampling, found = cache.manifest.sampling, []
    committed = cache.indices()
    for index in committed:
        place = cache.layout.place(int(index))
        prompt = prompts.get(place.prompt)
        if prompt is None:
            continue
        guidance = None
        if sampling.guidance is not None:
            # Redrawn, not read, so that no shard is opened.
            guidance = draw_guidance(
                sampling.guidance, seed=sampling.seed, prompt_id=prompt.id, sample_index=place.sample_index
            )
        found.append(
            HeldOut(
                index=int(index),
                key=trajectory_key(prompt.id, place.sample_index),
                prompt=place.prompt,
                text=prompt.text,
                sources=prompt.sources,
                guidance=guidance,
            )
        )
    if not found:
        raise NotInCacheError(
            f"{cache.folder} has {counted(len(committed), 'committed trajectory')}, none of them of the {len(prompts)} "
            f"held-out prompts among its {len(cache.prompts)}: one prompt in {HELD_OUT_EVERY} is held out, by a hash "
            f"of its text, and training uses all others; build more prompts, or give another cache of this teacher"
        )
    return found


def spread(trajectories: Sequence[HeldOut], count: int) -> list[int]:
    """Positions of `count` of these trajectories, ascending; all of them if there are fewer.

    They are sorted by sources, guidance and key (which begins with a hash of the text), and every len / count-th is
    taken, so that sources and guidance values are represented proportionally.
    """

    def order(place: int) -> tuple[tuple[str, ...], float, str]:
        found = trajectories[place]
        return found.sources, found.guidance or 0.0, found.key

    places = sorted(range(len(trajectories)), key=order)
    taken = min(count, len(places))
    return sorted(places[(2 * number + 1) * len(places) // (2 * taken)] for number in range(taken))
