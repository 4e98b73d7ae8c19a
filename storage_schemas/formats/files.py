"""Reads committed files only: the size is compared on first access, the checksum once per file and process."""

import threading
from typing import Literal, Protocol

from secondcast.storage_schemas.errors import DamagedCacheError, NotInCacheError, UnreadableFileError
from secondcast.storage_schemas.formats.local_cache import LocalCache
from secondcast.storage_schemas.io.digests import xxh3_128
from secondcast.storage_schemas.io.folders import Files
from secondcast.storage_schemas.schema.commits import CommitRecord, FileRecord, Records

Verify = Literal["off", "once", "always"]
"""When to compare checksums of shard files: never, on first access in a process, at every read. Sizes always are."""


class ByteSource(Protocol):
    """Source of shard bytes: a folder, or the memory of a builder before it commits."""

    def read(self, path: str, begin: int, end: int | None) -> bytes:
        """Bytes [begin, end) of a file, never fewer; a negative `begin` counts from its end."""
        ...


class MemoryFiles:
    """Encoded files that are not yet on disk."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def read(self, path: str, begin: int, end: int | None) -> bytes:
        """See ByteSource; KeyError for an unknown file."""
        return self._files[path][begin:end]


class CommittedFiles:
    """The committed files of a cache, read through local copies where there are any. Thread-safe."""

    def __init__(
        self, folder: Files, records: Records, *, verify: Verify, local_cache: LocalCache | None = None
    ) -> None:
        self._folder, self._records, self._verify, self._local_copy = folder, records, verify, local_cache
        self._touched: set[str] = set()
        self._lock = threading.Lock()

    def read(self, path: str, begin: int, end: int | None) -> bytes:
        """See ByteSource.

        NotInCacheError for a file that no record names, DamagedCacheError if it differs from its record.
        """
        owner = self._records.owner(path)
        if owner is None:
            raise NotInCacheError(f"{self._folder}/{path} is in no commit record: rerun the build command to make it")
        file, record = owner
        begin = begin if begin >= 0 else file.bytes + begin
        end = file.bytes if end is None else min(end, file.bytes)
        if self._verify == "always":
            return self._whole(file, record)[begin:end]
        if path not in self._touched:
            whole = self._whole(file, record) if self._verify == "once" else None
            if whole is None and self._part_here(file, 0, 0) is None:
                self.check(file, record, checksum=False)
            with self._lock:
                self._touched.add(path)
            if whole is not None:
                return whole[begin:end]
        data = self._part(file, record, begin, end)
        if len(data) != end - begin:
            raise damaged(self._folder, file, record, f"returned {len(data)} of {end - begin} bytes at {begin}")
        return data

    def _part(self, file: FileRecord, record: CommitRecord, begin: int, end: int) -> bytes:
        data = self._part_here(file, begin, end)
        if data is not None and len(data) == end - begin:
            return data
        if self._local_copy is not None and self._local_copy.takes(file):
            return self._through(self._local_copy, file, record)[begin:end]
        return self._read(file, record, begin, end)

    def _part_here(self, file: FileRecord, begin: int, end: int) -> bytes | None:
        return None if self._local_copy is None else self._local_copy.part(file, begin, end)

    def _through(self, local_cache: LocalCache, file: FileRecord, record: CommitRecord) -> bytes:
        return local_cache.whole(file, lambda: self._read(file, record, 0, None))

    def check(self, file: FileRecord, record: CommitRecord, *, checksum: bool) -> None:
        """Compare a file with its record; DamagedCacheError names the shard and the fix."""
        if checksum:
            self._whole(file, record)
            return
        size = self._folder.size(file.path)
        if size is None:
            raise damaged(self._folder, file, record, "is missing")
        if size != file.bytes:
            raise damaged(self._folder, file, record, f"has {size} bytes, expected {file.bytes}")

    def _whole(self, file: FileRecord, record: CommitRecord) -> bytes:
        if self._local_copy is not None:
            data = self._through(self._local_copy, file, record)
        else:
            data = self._read(file, record, 0, None)
        if len(data) != file.bytes:
            raise damaged(self._folder, file, record, f"has {len(data)} bytes, expected {file.bytes}")
        if (found := xxh3_128(data)) != file.xxh3_128:
            raise damaged(self._folder, file, record, f"has checksum {found}, expected {file.xxh3_128}")
        return data

    def _read(self, file: FileRecord, record: CommitRecord, begin: int, end: int | None) -> bytes:
        try:
            return self._folder.read(file.path, begin, end)
        except FileNotFoundError as error:
            raise damaged(self._folder, file, record, "is missing") from error
        except PermissionError as error:
            raise UnreadableFileError(
                f"{self._folder}/{file.path} cannot be read ({error.strerror}): this user lacks the permission; make "
                f"it readable"
            ) from error
        except OSError as error:
            raise damaged(self._folder, file, record, f"cannot be read ({error.strerror})") from error


def damaged(folder: Files, file: FileRecord, record: CommitRecord, what: str) -> DamagedCacheError:
    """The error for a file that differs from its record; it names the shard and both ways to repair it."""
    return DamagedCacheError(
        f"{folder}/{file.path} {what}: {record.kind} shard {record.shard} is damaged; "
        f"rebuild it with `secondcast repair {folder} --teacher TEACHER`, or "
        f"restore it from another copy with `secondcast repair {folder} --from COPY`"
    )
