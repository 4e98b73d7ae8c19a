"""Local copies of the shard files of remote caches, bounded in bytes.

They are stored under their checksum in a subfolder of the given folder: one copy serves every cache with the same
bytes, and none can be stale. Nothing outside that subfolder is touched.
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
LOCAL_COPY_GIB = 64.0
"""Default limit of such a folder."""
_NAME = re.compile(r"[0-9a-f]{32}")


class LocalCache:
    """Keeps complete copies of remote shard files, evicting the least recently used. Safe across threads and processes.

    Errors here never count as damage to a cache: a copy with wrong bytes is deleted, and if copies cannot be read or
    written, a warning is printed once and files are read from the cache itself.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, say: Callable[[str], None]) -> None:
        """folder: see `open`. say: prints the warning, at most once."""
        self.folder, self._limit, self._say = folder, limit_bytes, say
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}
        self._reads, self._writes = True, True

    @classmethod
    def open(cls, place: Path, *, limit_bytes: int, say: Callable[[str], None]) -> Self:
        """Open the copies below `place`, creating the folder; SettingsError if it cannot be created or written."""
        opened = cls(place / OWN_FOLDER, limit_bytes=limit_bytes, say=say)
        try:
            opened.folder.mkdir(parents=True, exist_ok=True)
            durable.remove_leftovers(opened.folder)
            durable.usual_mode(opened.folder)
        except OSError as error:
            raise SettingsError(
                f"--local-cache-dir {place} cannot be used ({error.strerror}): expected a writable folder, whose "
                f"{OWN_FOLDER}/ has the copies; give another one, or omit the option"
            ) from error
        return opened

    def whole(self, file: FileRecord, read: Callable[[], bytes]) -> bytes:
        """Get a whole file: the copy if its bytes match the record, else by `read`, keeping a copy."""
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
        """Bytes [begin, end) of a copied file; None if there is no copy, or it cannot be read."""
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
        """Whether a file is small enough to be copied, and its checksum a valid file name."""
        return file.bytes <= self._limit and _NAME.fullmatch(file.xxh3_128) is not None

    def _keep(self, file: FileRecord, data: bytes) -> None:
        if not self._writes or not self.takes(file) or xxh3_128(data) != file.xxh3_128:
            return
        try:
            self._make_room(len(data))
            durable.replace(self.folder / file.xxh3_128, data)
        except OSError as error:
            # Existing copies can still be read.
            self._writes = False
            self._off(error)

    def _off(self, error: OSError) -> None:
        what = "copies are kept" if self._reads else "copy is read"
        self._say(
            f"no further {what} in --local-cache-dir {self.folder.parent} ({error.strerror}): shard files are read "
            f"from the cache itself"
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
            # Set the time of last use, for eviction; this fails on another user's file.
            os.utime(descriptor)
        size = os.fstat(descriptor).st_size
        length = (size if end is None else min(end, size)) - begin
        data = os.pread(descriptor, max(0, length), begin)
        # One call reads at most 2 GiB.
        while 0 < len(data) < length and (more := os.pread(descriptor, length - len(data), begin + len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)
