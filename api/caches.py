"""`secondcast.open_cache`, and the caches of a run."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.formats.files import Verify
from secondcast.storage_schemas.formats.local_cache import LOCAL_COPY_GIB, LocalCache
from secondcast.storage_schemas.progress import Silent
from secondcast.storage_schemas.reader import Cache


def open_cache(
    location: str | Path,
    *,
    verify_checksums: Verify = "once",
    local_cache_dir: str | Path | None = None,
    local_cache_gib: float = LOCAL_COPY_GIB,
) -> Cache:
    """Open a cache for reading, finished or still being built.

    location: its folder, or s3://bucket/prefix.
    verify_checksums: when to verify checksums of shard files: off, once per file, or always (at every read).
    local_cache_dir: keeps shard files from an object store in its folder secondcast-shards.
    local_cache_gib: maximum size of that folder.

    Raises NotACacheError, and DamagedCacheError for files that differ from the manifest.
    """
    copies = local_copies(local_cache_dir, local_cache_gib, Silent().say)
    return Cache.open(str(location), verify=verify_checksums, local_cache=copies)


def open_caches(
    places: Mapping[str, str | Cache], *, verify_checksums: Verify, copies: LocalCache | None
) -> dict[str, Cache]:
    """The caches at these places, by name; those that are open already as they are."""
    return {
        name: place if isinstance(place, Cache) else Cache.open(place, verify=verify_checksums, local_cache=copies)
        for name, place in places.items()
    }


def local_copies(place: str | Path | None, limit_gib: float, say: Callable[[str], None]) -> LocalCache | None:
    """Local copies of shard files below a folder; None without one."""
    if place is None:
        return None
    if not 0 < limit_gib < math.inf:
        raise SettingsError(f"--local-cache-gib is {limit_gib}, expected a number of GiB such as {LOCAL_COPY_GIB:g}")
    return LocalCache.open(Path(place), limit_bytes=int(limit_gib * 2**30), say=say)
