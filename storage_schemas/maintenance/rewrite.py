"""Writes a cache from the rows of others, for convert, subset and merge; resumes and commits like a build."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from secondcast.storage_schemas.errors import DerivationMismatchError, SettingsError
from secondcast.storage_schemas.io.digests import canonical_json
from secondcast.storage_schemas.io.folders import Location, is_remote, location_of, open_folder
from secondcast.storage_schemas.progress import Progress
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.record import Trajectory
from secondcast.storage_schemas.schema.commits import KINDS, Kind
from secondcast.storage_schemas.schema.derivation import derive_latents
from secondcast.storage_schemas.schema.fields import Array, Arrays, fields_of, same_bits
from secondcast.storage_schemas.schema.layout import ShardRange
from secondcast.storage_schemas.schema.manifest import Manifest
from secondcast.storage_schemas.schema.prompts import Prompt
from secondcast.storage_schemas.writer import CacheWriter

COPIED_FROM = "copied_from"
OTHER_ROWS = "other_rows"
DIFFERING_DUPLICATES = "differing_duplicates"
# Requests to a store are dominated by latency; on a local disk one thread is fastest.
_READERS_OF_A_STORE = 8


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A committed row of a source: index of the trajectory (or of the embedding's prompt), and shard."""

    cache: Cache
    index: int
    shard: int


class Source:
    """A cache to copy rows from, by prompt id and sample."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.prompts: list[Prompt] = list(cache.prompts)
        self.numbers = {prompt.id: number for number, prompt in enumerate(self.prompts)}

    def find(self, kind: Kind, prompt_id: str, sample_index: int) -> Origin | None:
        """The row of a prompt and sample (None for an embedding); None if it is not committed."""
        index = self.numbers.get(prompt_id)
        if index is not None and kind == "trajectories":
            index = self.cache.layout.find(index, sample_index)
        if index is None:
            return None
        layout = self.cache.layout
        shard = layout.place(index).shard if kind == "trajectories" else layout.embedding_place(index)[0]
        return Origin(cache=self.cache, index=index, shard=shard) if (kind, shard) in self.cache.records else None


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """Committed and planned rows of the target, and its prompts without a negative one.

    differing: rows for which another source has different bits.
    """

    location: str
    prompts: int
    trajectories: int
    planned: int
    embeddings_missing: int
    bytes: int
    differing: dict[Kind, int]


def rewrite(
    location: Location,
    manifest: Manifest,
    prompts: list[Prompt],
    sources: Sequence[Source],
    progress: Progress,
    *,
    title: str,
) -> Rewritten:
    """Write all missing shards at `location` whose rows the sources have; earlier sources take precedence.

    Raises SettingsError for a target inside a source, SettingsMismatchError for a target with other settings,
    DerivationMismatchError if latents that the target does not store differ from the derived ones.
    """
    _check_apart(location, sources)
    writer = CacheWriter.create_or_resume(location, manifest, prompts, sources[0].cache.tokenizer_files)
    keeps_embeddings = manifest.keeps_embeddings
    if keeps_embeddings:
        _copy(writer, "embeddings", sources, progress, title="text", unit="prompts")
    if not manifest.is_text:
        _copy(writer, "trajectories", sources, progress, title=title, unit="trajectories")
    writer.finish()
    records = writer.records()
    differing: dict[Kind, int] = dict.fromkeys(KINDS, 0)
    for (kind, _), record in records.items():
        differing[kind] += record.provenance.get(DIFFERING_DUPLICATES, 0)
    return Rewritten(
        location=str(writer.folder),
        prompts=manifest.own_prompts,
        trajectories=records.rows("trajectories"),
        planned=len(writer.layout),
        embeddings_missing=sum(shard.rows for shard in writer.missing("embeddings")) if keeps_embeddings else 0,
        bytes=records.bytes,
        differing=differing,
    )


def _check_apart(location: Location, sources: Sequence[Source]) -> None:
    target = location_of(open_folder(location))
    for source in sources:
        found = source.cache.location
        if f"{target}/".startswith(f"{found}/") or f"{found}/".startswith(f"{target}/"):
            raise SettingsError(
                f"the target {target} and the source {found} are one inside the other, but a source is never "
                f"modified: give a new or empty folder outside it"
            )


def _copy(
    writer: CacheWriter, kind: Kind, sources: Sequence[Source], progress: Progress, *, title: str, unit: str
) -> None:
    missing = writer.missing(kind)
    if not missing:
        return
    total = len(writer.layout) if kind == "trajectories" else len(writer.prompts)
    done = total - sum(shard.rows for shard in missing)
    readers = _READERS_OF_A_STORE if any(is_remote(source.cache.location) for source in sources) else 1
    with ThreadPoolExecutor(readers) as pool, progress.bar(title, total=total, done=done, unit=unit) as bar:
        for shard in missing:
            started = time.monotonic()
            origins = [_origins(writer, kind, item, sources) for item in range(shard.first, shard.first + shard.rows)]
            if not all(origins):
                continue
            arrays, differing = _read(writer.manifest, kind, shard, origins, pool)
            made = _provenance(kind, [row[0] for row in origins], differing)
            writer.commit(kind, shard, arrays, seconds=time.monotonic() - started, provenance=made)
            bar.advance(shard.rows)


def _origins(writer: CacheWriter, kind: Kind, item: int, sources: Sequence[Source]) -> list[Origin]:
    """The committed rows of an item in all sources, the one to copy first."""
    if kind == "embeddings":
        prompt, sample_index = item, 0
    else:
        place = writer.layout.place(item)
        prompt, sample_index = place.prompt, place.sample_index
    identity = writer.prompts[prompt].id
    return [found for source in sources if (found := source.find(kind, identity, sample_index))]


def _read(
    manifest: Manifest, kind: Kind, shard: ShardRange, origins: list[list[Origin]], pool: ThreadPoolExecutor
) -> tuple[Arrays, int]:
    """The arrays of a shard, and how many of its rows have different bits in a later source."""
    fields = fields_of(manifest, kind)
    arrays = {field.name: np.empty((shard.rows, *field.row_shape), dtype=field.dtype) for field in fields}

    def fill(row: int) -> bool:
        first, *others = origins[row]
        for name, value in _row(first, kind, arrays).items():
            arrays[name][row] = value
        # Compare every copy: different bits from two machines must be reported.
        copies = (_row(other, kind, arrays) for other in others)
        return any(not same_bits(arrays[name][row], value) for copy in copies for name, value in copy.items())

    return arrays, sum(pool.map(fill, range(shard.rows)))


def _row(origin: Origin, kind: Kind, names: Iterable[str]) -> Arrays:
    if kind == "embeddings":
        return origin.cache.text_row(origin.index)
    trajectory = origin.cache.trajectory(origin.index)
    return {name: _field(origin.cache, trajectory, name) for name in names}


def _field(cache: Cache, trajectory: Trajectory, name: str) -> Array:
    match name:
        case "velocity":
            return trajectory.velocity_KSC
        case "final_latent":
            return trajectory.final_latent_SC
        case "hidden_states":
            return trajectory.hidden_states_KSC
        case "noise":
            _check_derives(cache, trajectory)
            return trajectory.noise_SC
        case "guidance":
            return np.asarray(trajectory.guidance, dtype=np.float32)
    raise ValueError(f"field {name!r} of a trajectory is unknown")


def _check_derives(cache: Cache, trajectory: Trajectory) -> None:
    """Raise DerivationMismatchError if stored latents, which the target drops, differ from the derived ones."""
    stored = trajectory.stored_latents_KSC
    if stored is None:
        return
    derived = derive_latents(trajectory.noise_SC, trajectory.velocity_KSC, trajectory.sigmas)
    for step, latent_SC in enumerate([*stored, trajectory.final_latent_SC]):
        if not same_bits(derived[step], latent_SC):
            count = int((derived[step] != latent_SC).sum())
            raise DerivationMismatchError(
                f"{cache.folder}: latent {step} of trajectory {trajectory.index} derived from noise and velocity "
                f"differs from the stored one in {count} of {latent_SC.size} elements: it was recorded on a device "
                f"that rounds differently; keep --latents stored"
            )


def ways_made(provenance: dict[str, Any]) -> list[dict[str, Any]]:
    """Provenances of the rows of a shard: one for a built shard, possibly several for a copied one."""
    own = {k: v for k, v in provenance.items() if k not in (COPIED_FROM, OTHER_ROWS, DIFFERING_DUPLICATES)}
    return [own, *provenance.get(OTHER_ROWS, [])]


def _provenance(kind: Kind, origins: list[Origin], differing: int) -> dict[str, Any]:
    """Provenance of the first source shard, of the others where it differs, and all locations of the rows."""
    shards = list({(id(o.cache), o.shard): o for o in origins}.values())
    made = [o.cache.records[kind, o.shard].provenance for o in shards]
    first, *others = _distinct([way for provenance in made for way in ways_made(provenance)])
    earlier = [place for provenance in made for place in provenance.get(COPIED_FROM, [])]
    kept = {**first, COPIED_FROM: _distinct([*earlier, *(o.cache.location for o in shards)])}
    kept |= {OTHER_ROWS: others} if others else {}
    return kept | ({DIFFERING_DUPLICATES: differing} if differing else {})


def _distinct(values: list[Any]) -> list[Any]:
    return list({canonical_json(value): value for value in values}.values())
