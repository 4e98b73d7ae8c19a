"""Copies, on this machine, of the shard files of caches that are elsewhere; bounded in bytes.

They are kept in a folder of their own below the one that is given, under their checksum: one copy serves every cache
that holds the same bytes, and none can be stale. Nothing outside of that folder is touched.
"""

import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from secondcast.storage_schemas.errors import SettingsError
from secondcast.storage_schemas.io import durable
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.schema.commits import FileRecord

OWN_FOLDER = "secondcast-shards"
_NAME = re.compile(r"[0-9a-f]{32}")


class LocalCache:
    """Keeps shard files that were read from elsewhere, whole; the longest unused go first. Safe in threads, processes.

    Trouble here is no damage of a cache: a copy with other bytes is deleted, and where files cannot be read or written
    here, one line says so and they come from the cache itself.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, say: Callable[[str], None]) -> None:
        """folder: see `open`. say: takes the line about trouble, once."""
        self.folder, self._limit, self._say = folder, limit_bytes, say
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}
        self._reads, self._writes = True, True

    @classmethod
    def open(cls, place: Path, *, limit_bytes: int, say: Callable[[str], None]) -> Self:
        """Copies in a folder below `place`, which is made; SettingsError where it cannot be made or written."""
        opened = cls(place / OWN_FOLDER, limit_bytes=limit_bytes, say=say)
        try:
            opened.folder.mkdir(parents=True, exist_ok=True)
            durable.remove_leftovers(opened.folder)
            durable.usual_mode(opened.folder)
        except OSError as error:
            raise SettingsError(
                f"--local-cache-dir {place} cannot be used ({error.strerror}): expected a folder that can be written, whose "
                f"{OWN_FOLDER}/ holds the copies; give another one, or leave it out"
            ) from error
        return opened

    def whole(self, file: FileRecord, read: Callable[[], bytes]) -> bytes:
        """A whole file: from here if its bytes are what the record says, else by `read`; then it is kept."""
        with self._lock:
            fetching = self._fetching.setdefault(file.xxh3_128, threading.Lock())
        with fetching:
            data = self.part(file, 0, None)
            if data is not None:
                if xxh3_128(data) == file.xxh3_128:
                    return data
                self._delete(self.folder / file.xxh3_128)
            data = read()
            self._keep(file, data)
            return data

    def part(self, file: FileRecord, begin: int, end: int | None) -> bytes | None:
        """Bytes [begin, end) of a file that is kept here; None if it is not, or cannot be read."""
        if not self._reads or not self.takes(file):
            return None
        try:
            return _read(self.folder / file.xxh3_128, begin, end)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._reads = self._writes = False
            self._off(error)
            return None

    def takes(self, file: FileRecord) -> bool:
        """Whether a file is small enough to be kept, and its checksum one that can be a name."""
        return file.bytes <= self._limit and _NAME.fullmatch(file.xxh3_128) is not None

    def _keep(self, file: FileRecord, data: bytes) -> None:
        if not self._writes or not self.takes(file) or xxh3_128(data) != file.xxh3_128:
            return
        try:
            self._make_room(len(data))
            durable.replace(self.folder / file.xxh3_128, data)
        except OSError as error:
            # What is here can still be read.
            self._writes = False
            self._off(error)

    def _off(self, error: OSError) -> None:
        what = "copies are kept" if self._reads else "copy is read"
        self._say(
            f"no further {what} in --local-cache-dir {self.folder.parent} ({error.strerror}): shard files are read from the "
            f"cache itself"
        )

    def _make_room(self, needed_bytes: int) -> None:
        with self._lock:
            kept = []
            for file in os.scandir(self.folder):
                with suppress(FileNotFoundError):
                    if _NAME.fullmatch(file.name) and file.is_file(follow_symlinks=False):
                        kept.append((file.stat().st_mtime_ns, file.stat().st_size, Path(file)))
            total = sum(size for _, size, _ in kept) + needed_bytes
            for _, size, path in sorted(kept):
                if total <= self._limit:
                    return
                path.unlink(missing_ok=True)
                total -= size

    def _delete(self, path: Path) -> None:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _read(path: Path, begin: int, end: int | None) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            # The time of the last use, by which the longest unused are found; not of another user's file.
            os.utime(descriptor)
        size = os.fstat(descriptor).st_size
        length = (size if end is None else min(end, size)) - begin
        data = os.pread(descriptor, max(0, length), begin)
        # One call gives at most 2 GiB.
        while 0 < len(data) < length and (more := os.pread(descriptor, length - len(data), begin + len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)
