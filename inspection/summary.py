"""`inspect summary`: overview of a cache on one screen. Reads manifest and commit records; no torch."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from secondcast.storage_schemas.io.digests import canonical_json
from secondcast.storage_schemas.io.folders import LocalFolder
from secondcast.storage_schemas.maintenance.rewrite import COPIED_FROM, ways_made
from secondcast.storage_schemas.maintenance.stored_bytes import StoredArray, stored_arrays
from secondcast.storage_schemas.maintenance.verify import planned_shards
from secondcast.storage_schemas.reader import Cache
from secondcast.storage_schemas.schema.commits import CommitRecord
from secondcast.storage_schemas.schema.fields import fields_of, kinds_of
from secondcast.storage_schemas.schema.journal import is_pending
from secondcast.storage_schemas.schema.recording import Sampling

# Time limit for a slow network disk; the summary reports how many files were checked.
_FILES_SECONDS = 0.4
_FILES_BETWEEN_LOOKS_AT_THE_CLOCK = 64
# Times have a resolution of seconds, too coarse to count workers of shorter builds.
_SECONDS_THAT_TELL_WORKERS = 30


def summarise(cache: Cache) -> dict[str, Any]:
    """The facts of a cache, as plain JSON types."""
    manifest, sampling = cache.manifest, cache.manifest.sampling_or_none
    records = list(cache.records.values())
    arrays = stored_arrays(cache)
    return {
        "path": str(cache.folder),
        "state": _state(cache),
        "trajectories": {"committed": len(cache), "planned": cache.planned},
        "prompts": {
            "count": manifest.prompts.count,
            "held_out": manifest.prompts.held_out,
            "sources": manifest.prompts.sources,
        },
        "teacher": {
            "source": manifest.source,
            "text_length": manifest.teacher.text_length,
            "text_width": manifest.teacher.text_width,
            "pooled": manifest.teacher.pooled if manifest.teacher.pooled_width else "none",
            "padding": "read" if manifest.teacher.text_mask is None else "masked",
        },
        "sampling": None if sampling is None else _sampling(sampling),
        "storage": {
            **manifest.storage.json_value(),
            "dtype": manifest.dtype,
            "embeddings": "stored" if manifest.keeps_embeddings else "none",
            "bytes": cache.records.bytes,
            "raw_bytes": sum(array.raw_bytes for array in arrays),
            "row_bytes": {
                field.name: field.row_bytes for kind in kinds_of(manifest) for field in fields_of(manifest, kind)
            },
            "arrays": [_array(array) for array in arrays],
        },
        "integrity": {"shards": _shards(cache), "files": _files(cache, records), "checksums": "not compared"},
        "build": {"created_by": manifest.created_by, **built_facts(records)},
        "digests": manifest.digests(),
    }


def _sampling(sampling: Sampling) -> dict[str, Any]:
    return {
        "size": f"{sampling.width} x {sampling.height}",
        "image_tokens": sampling.image_tokens,
        "channels": sampling.channels,
        "steps": sampling.steps,
        "schedule": sampling.schedule,
        "sigmas": [sampling.sigmas[0], sampling.sigmas[-2]],
        "guidance": list(sampling.guidance) if sampling.guidance else None,
        "seed": sampling.seed,
        "dtype": sampling.dtype,
        "quantize": sampling.quantize,
    }


def _state(cache: Cache) -> str:
    if is_pending(cache.folder):
        return "being extended"
    return "finished" if cache.finished else "being built"


def _array(array: StoredArray) -> dict[str, Any]:
    ratio = None if array.stored_bytes is None else array.stored_bytes / array.raw_bytes
    return {
        "name": array.name,
        "rows": array.rows,
        "stored_bytes": array.stored_bytes,
        "raw_bytes": array.raw_bytes,
        "stored_per_raw_ratio": ratio,
        "sampled": array.sampled,
    }


def _shards(cache: Cache) -> dict[str, int]:
    # Embeddings that are not stored exist during the build, but are not shards of the cache.
    planned = planned_shards(cache.manifest)
    return {"committed": sum(key in planned for key in cache.records), "planned": len(planned)}


def _files(cache: Cache, records: Sequence[CommitRecord]) -> dict[str, Any]:
    """Whether committed files exist with their recorded sizes, for as many files as the time limit allows."""
    named = sum(len(record.files) for record in records)
    found: dict[str, Any] = {"recorded": named, "looked_at": 0, "missing": 0, "other_size": 0, "first_wrong": None}
    if not isinstance(cache.folder, LocalFolder):
        return found
    end = time.monotonic() + _FILES_SECONDS
    for file in (file for record in records for file in record.files):
        if found["looked_at"] % _FILES_BETWEEN_LOOKS_AT_THE_CLOCK == 0 and time.monotonic() > end:
            break
        found["looked_at"] += 1
        try:
            # Not with Path, which takes a second for a hundred thousand files.
            right = os.stat(f"{cache.folder.path}/{file.path}").st_size == file.bytes  # noqa: PTH116
        except OSError:
            right = False
            found["missing"] += 1
        else:
            found["other_size"] += not right
        if not right and found["first_wrong"] is None:
            found["first_wrong"] = file.path
    return found


def built_facts(records: Sequence[CommitRecord]) -> dict[str, Any]:
    """How and how fast the shards were made; workers and rates are None if the records do not have them.

    seconds: total over all workers. busy_seconds: time during which at least one trajectory shard was being made.
    """
    made = [record for record in records if record.kind == "trajectories"]
    copied = sorted({place for record in records for place in record.provenance.get(COPIED_FROM, [])})
    seconds, busy = sum(record.seconds for record in made), _busy_seconds(made)
    rows = sum(record.rows for record in made)
    rate = round(3600 * rows / busy, 1) if busy and not copied else None
    return {
        "seconds": round(sum(record.seconds for record in records), 1),
        "busy_seconds": round(busy, 1),
        "trajectories_per_hour": rate,
        "workers": round(seconds / busy) if busy > _SECONDS_THAT_TELL_WORKERS and not copied else None,
        "last_commit": max((record.finished_at for record in records), default=None),
        "copied_from": copied,
        "ways": _ways(made or records),
        "provenance": records[-1].provenance if records else {},
    }


def _busy_seconds(records: Sequence[CommitRecord]) -> float:
    """Seconds in the union of the intervals in which shards were made, without pauses of an interrupted build."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(span for record in records if (span := _span(record))):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _span(record: CommitRecord) -> tuple[float, float] | None:
    """Interval in which a shard was made, in seconds since 1970; None if its record has no time."""
    try:
        end = datetime.fromisoformat(record.finished_at).timestamp()
    except ValueError:
        return None
    return end - record.seconds, end


def _ways(records: Sequence[CommitRecord]) -> list[dict[str, Any]]:
    """Each distinct provenance with its number of shards, the most frequent first."""
    # Group by text first: thousands of shards share a provenance, and the canonical form is slow.
    texts = Counter(repr(record.provenance) for record in records)
    one_of = {repr(record.provenance): record.provenance for record in records}
    counts: Counter[bytes] = Counter()
    values: dict[bytes, dict[str, Any]] = {}
    for text, count in texts.items():
        for way in ways_made(one_of[text]):
            counts[canonical_json(way)] += count
            values[canonical_json(way)] = way
    return [{"shards": count, **values[text]} for text, count in counts.most_common()]
