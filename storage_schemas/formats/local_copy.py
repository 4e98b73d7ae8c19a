"""A read-through copy, on this machine, of the shard files of a cache that lies elsewhere; bounded in bytes.

Files are kept under their checksum: one copy serves every cache that holds the same bytes, and none can be stale.
"""

import os
import threading
from pathlib import Path

from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import Folder
from secondcast.storage_schemas.schema.commits import Records


class LocalCopy:
    """Reads whole shard files once and then from `path`; the longest unused go first. Safe in threads and processes."""

    def __init__(self, folder: Folder, records: Records, path: Path, *, limit_bytes: int) -> None:
        self._folder, self._records, self._path, self._limit = folder, records, path, limit_bytes
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}

    def __str__(self) -> str:
        return str(self._folder)

    def size(self, path: str) -> int | None:
        """See Folder."""
        local = self._local(path)
        if local is not None and local.is_file():
            return local.stat().st_size
        return self._folder.size(path)

    def read(self, path: str, begin: int = 0, end: int | None = None) -> bytes:
        """See Folder; a file is fetched whole at its first touch, unless it is larger than the limit."""
        local = self._local(path)
        if local is None:
            return self._folder.read(path, begin, end)
        for fetched in (False, True):
            try:
                return _read_local(local, begin, end)
            except FileNotFoundError:
                if fetched or not self._fetch(path, local):
                    break
        return self._folder.read(path, begin, end)

    def _local(self, path: str) -> Path | None:
        owner = self._records.owner(path)
        return None if owner is None or owner[0].bytes > self._limit else self._path / owner[0].xxh3_128

    def _fetch(self, path: str, local: Path) -> bool:
        """Copy a file here if its bytes are what the record says; whether they are."""
        with self._lock:
            fetching = self._fetching.setdefault(local.name, threading.Lock())
        with fetching:
            if local.is_file():
                return True
            data = self._folder.read(path)
            if xxh3_128(data) != local.name:
                return False
            self._path.mkdir(parents=True, exist_ok=True)
            self._make_room(len(data))
            durable.replace(local, data)
            return True

    def _make_room(self, needed_bytes: int) -> None:
        with self._lock:
            kept = []
            for file in self._path.iterdir():
                try:
                    kept.append((file.stat().st_mtime_ns, file.stat().st_size, file))
                except FileNotFoundError:
                    continue
            total = sum(size for _, size, _ in kept) + needed_bytes
            for _, size, file in sorted(kept):
                if total <= self._limit:
                    return
                file.unlink(missing_ok=True)
                total -= size


def _read_local(local: Path, begin: int, end: int | None) -> bytes:
    descriptor = os.open(local, os.O_RDONLY)
    try:
        # The time of the last use, by which the longest unused are found.
        os.utime(descriptor)
        size = os.fstat(descriptor).st_size
        length = (size if end is None else min(end, size)) - begin
        return os.pread(descriptor, max(0, length), begin)
    finally:
        os.close(descriptor)
