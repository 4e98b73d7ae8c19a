"""The table of a report: a row for each committed trajectory, with the norms of those that were read."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from secondcast.inspection.report.integrity import Readable
from secondcast.models.noise import draw_guidance
from secondcast.storage_schemas.errors import DamagedCacheError
from secondcast.storage_schemas.io.folders import LocalFolder
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache, prompt_table
from secondcast.storage_schemas.record import trajectory_key
from secondcast.storage_schemas.schema.fields import Array
from secondcast.storage_schemas.schema.prompts import Prompt

# Requests to an object store take much longer than the computation on their data.
_READERS_OF_A_STORE = 16
_READ_TOGETHER = 64
UNREADABLE = "(cannot be read)"
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Root mean squares of the finite values of a trajectory over all steps, and the number of other values."""

    velocity_rms: float | None
    final_rms: float | None
    non_finite: int


def rounded(value: float | None) -> float | None:
    """Round to four significant digits; None for a value that is not finite."""
    return float(f"{value:.{_DIGITS}g}") if value is not None and np.isfinite(value) else None


def committed_columns(cache: Cache) -> tuple[dict[str, list[Any]], list[str]]:
    """Columns of each committed trajectory from prompts and layout; and notes."""
    prompts = _prompts(cache)
    sampling = cache.manifest.sampling
    names = sorted({name for prompt in prompts if prompt is not None for name in prompt.sources})
    number_of = {name: number for number, name in enumerate(names)}
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("index", "key", "prompt", "sources", "guidance", "sample_index", "held_out", "tokens")
    }  # fmt: skip
    for index in cache.indices().tolist():
        place = cache.layout.place(index)
        prompt = prompts[place.prompt]
        guidance = None
        if sampling.guidance is not None and prompt is not None:
            # Redrawn, not read, so that no shard is opened.
            guidance = draw_guidance(
                sampling.guidance, seed=sampling.seed, prompt_id=prompt.id, sample_index=place.sample_index
            )  # fmt: skip
        row = {
            "index": index,
            "key": UNREADABLE if prompt is None else trajectory_key(prompt.id, place.sample_index),
            "prompt": UNREADABLE if prompt is None else prompt.text,
            "sources": [] if prompt is None else [number_of[name] for name in prompt.sources],
            "guidance": rounded(guidance),
            "sample_index": place.sample_index,
            "held_out": int(prompt is not None and prompt.held_out),
            "tokens": 0 if prompt is None else len(prompt.token_ids),
        }
        for name, value in row.items():
            columns[name].append(value)
    lost = sum(prompt is None for prompt in prompts)
    notes = [f"{lost:,} of {len(prompts):,} prompts cannot be read: see the problems"] if lost else []
    return {"source_names": names, **columns}, notes


def _prompts(cache: Cache) -> list[Prompt | None]:
    try:
        return list(cache.prompts)
    except DamagedCacheError:
        # Line by line: only a prompt whose text does not match its id is omitted.
        table = prompt_table(cache.folder, cache.manifest, verify="off")
        return [_one_prompt(table, number) for number in range(len(table))]


def _one_prompt(table: Sequence[Prompt], number: int) -> Prompt | None:
    try:
        return table[number]
    except DamagedCacheError:
        return None


def norm_columns(readable: Readable, limit: int, progress: Progress) -> tuple[dict[str, list[Any]], list[str]]:
    """Norms by column, None for trajectories that are not read; and notes. At most `limit` are read, spread evenly."""
    indices = readable.cache.indices()
    count = len(indices)
    taken = evenly(count, limit)
    found = _read_norms(readable, [int(indices[row]) for row in taken], progress)
    columns: dict[str, list[Any]] = {name: [None] * count for name in ("velocity_rms", "final_rms", "non_finite")}
    for row, norms in zip(taken, found, strict=True):
        if norms is not None:
            columns["velocity_rms"][row] = rounded(norms.velocity_rms)
            columns["final_rms"][row] = rounded(norms.final_rms)
            columns["non_finite"][row] = norms.non_finite
    notes = []
    if len(taken) < count:
        spread = ", spread evenly" if taken else ""
        notes.append(
            f"norms of {len(taken):,} of {count:,} trajectories{spread}; for all of them use `secondcast inspect "
            f"report --max-norms {count}`"
        )
    if lost := sum(norms is None for norms in found):
        notes.append(f"{lost:,} of the {len(taken):,} trajectories chosen for norms are in damaged shards")
    return columns, notes


def evenly(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, ascending, spread evenly."""
    if count <= limit:
        return list(range(count))
    return [(2 * number + 1) * count // (2 * limit) for number in range(limit)]


def _read_norms(readable: Readable, indices: Sequence[int], progress: Progress) -> list[Norms | None]:
    """Norms in the order of the indices, which is that of the shards."""

    def read(index: int) -> Norms | None:
        trajectory = readable.trajectory(index)
        if trajectory is None:
            return None
        velocity, final = trajectory.velocity_KSC, trajectory.final_latent_SC
        velocity_rms, velocity_wrong = finite_rms(velocity)
        final_rms, final_wrong = finite_rms(final)
        return Norms(velocity_rms=velocity_rms, final_rms=final_rms, non_finite=velocity_wrong + final_wrong)

    local = isinstance(readable.cache.folder, LocalFolder)
    found: list[Norms | None] = []
    with (
        progress.bar("norms", total=len(indices), done=0, unit="trajectories") as bar,
        ThreadPoolExecutor(1 if local else _READERS_OF_A_STORE) as pool,
    ):
        for first in range(0, len(indices), _READ_TOGETHER):
            part = list(pool.map(read, indices[first : first + _READ_TOGETHER]))
            found += part
            bar.advance(len(part))
    return found


def finite_rms(array: Array) -> tuple[float | None, int]:
    """Root mean square of the finite values of an array, None without any; and the number of other values."""
    values = array.astype(np.float32, copy=False).ravel()
    finite = np.isfinite(values)
    wrong = int(values.size - np.count_nonzero(finite))
    kept = values if not wrong else values[finite]
    if not kept.size:
        return None, wrong
    return float(np.sqrt(np.mean(np.square(kept, dtype=np.float64)))), wrong
