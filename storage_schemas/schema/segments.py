"""Computes the segments that add requested samples to a cache, after its existing segments.

The samples of a prompt are the bits of an integer: bit r stands for sample r. A prompt of a text cache has bit 0.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from secondcast.storage_schemas.schema.manifest import Segment


def samples_per_prompt_of(segments: Iterable[Segment]) -> dict[int, int]:
    """Samples (as bits) that segments plan, by prompt number."""
    found: dict[int, int] = {}
    for g in segments:
        bits = ((1 << (g.samples_per_prompt or 1)) - 1) << g.first_sample
        for number in range(g.first_prompt, g.first_prompt + g.prompts):
            found[number] = found.get(number, 0) | bits
    return found


def added_segments(
    have: Mapping[int, int], wanted: Mapping[int, int], *, shard_size: int, text: bool = False
) -> tuple[Segment, ...]:
    """Segments for the samples that `wanted` adds to `have`, both by prompt number; empty if none are added.

    text: of a text cache.
    In ascending order of prompts: `Layout` assigns embeddings to prompts in that order.
    """
    added = {number: new for number, bits in wanted.items() if (new := bits & ~have.get(number, 0))}
    return tuple(
        Segment(
            first_prompt=first,
            prompts=count,
            first_sample=r,
            samples_per_prompt=0 if text else n,
            shard_size=shard_size,
        )
        for first, count, new in _runs(added)
        for r, n in _ranges(new)
    )


def _runs(added: Mapping[int, int]) -> Iterator[tuple[int, int, int]]:
    """First prompt, number of prompts and samples of each run of consecutive prompts that add the same samples."""
    numbers = sorted(added)
    for (_, bits), group in groupby(enumerate(numbers), key=lambda pair: (pair[1] - pair[0], added[pair[1]])):
        run = [number for _, number in group]
        yield run[0], len(run), bits


def _ranges(bits: int) -> Iterator[tuple[int, int]]:
    """First sample and number of samples of each run of ones."""
    first = 0
    while bits:
        skipped = (bits & -bits).bit_length() - 1
        bits >>= skipped
        ones = (~bits & (bits + 1)).bit_length() - 1
        yield first + skipped, ones
        first, bits = first + skipped + ones, bits >> ones
