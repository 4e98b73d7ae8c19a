"""Reading only what a commit record vouches for: size at first touch, checksum once per file and process."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Protocol

from storage_schemas.commits import COMMITS_FOLDER, INDEX_FILE, CommitRecord, FileRecord, record_name
from storage_schemas.digests import xxh3_128
from storage_schemas.errors import DamagedCache, NotInCache

Verify = Literal["off", "once"]


class ByteSource(Protocol):
    """Where the bytes of shards come from: a folder, or the memory of a builder before it commits."""

    def read(self, path: str, begin: int, end: int | None) -> bytes:
        """Bytes [begin, end) of a file; a negative `begin` counts from its end. Never short, never made up."""
        ...


class MemoryFiles:
    """Encoded files that are not on disk yet."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    def read(self, path: str, begin: int, end: int | None) -> bytes:
        """See ByteSource; KeyError for an unknown file."""
        return self._files[path][begin:end]


class CommittedFiles:
    """The committed files of a cache folder, read by position (mmap can kill a process on network disks)."""

    def __init__(self, cache: Path, records: Iterable[CommitRecord], *, verify: Verify) -> None:
        self._cache = cache
        self._verify = verify
        self._known: dict[str, tuple[FileRecord, CommitRecord]] = {}
        self._touched: set[str] = set()
        for record in records:
            for file in record.files:
                self._known[file.path] = (file, record)

    def read(self, path: str, begin: int, end: int | None) -> bytes:
        """See ByteSource; NotInCache for a file no record names, DamagedCache where disk and record differ."""
        if path not in self._known:
            raise NotInCache(f"{self._cache / path} is in no commit record: give the build command again to make it")
        file, record = self._known[path]
        if path not in self._touched:
            self.check(file, record, checksum=self._verify == "once")
            self._touched.add(path)
        begin = begin if begin >= 0 else file.bytes + begin
        length = (file.bytes if end is None else min(end, file.bytes)) - begin
        try:
            descriptor = os.open(self._cache / path, os.O_RDONLY)
        except OSError as error:
            raise self._damaged(file, record, f"cannot be opened ({error.strerror})") from error
        try:
            data = os.pread(descriptor, length, begin)
        finally:
            os.close(descriptor)
        if len(data) != length:
            raise self._damaged(file, record, f"gave {len(data)} bytes of {length} at {begin}")
        return data

    def check(self, file: FileRecord, record: CommitRecord, *, checksum: bool) -> None:
        """Compare a file with its record; DamagedCache names the shard and the way out."""
        path = self._cache / file.path
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise self._damaged(file, record, "is missing")
        if size != file.bytes:
            raise self._damaged(file, record, f"has {size} bytes, expected {file.bytes}")
        if checksum and (found := xxh3_128(path.read_bytes())) != file.xxh3_128:
            raise self._damaged(file, record, f"has checksum {found}, expected {file.xxh3_128}")

    def _damaged(self, file: FileRecord, record: CommitRecord, what: str) -> DamagedCache:
        name = record_name(record.kind, record.shard)
        return DamagedCache(
            f"{self._cache / file.path} {what}: {record.kind} shard {record.shard} is damaged; delete "
            f"{COMMITS_FOLDER}/{name} and {COMMITS_FOLDER}/{INDEX_FILE} and give the build command again to rebuild it"
        )
