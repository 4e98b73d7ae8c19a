"""Storage of a cache: a local folder or a prefix of an object store, behind the same few operations."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from secondcast.storage_schemas.errors import DamagedCacheError
from secondcast.storage_schemas.io import durable

OBJECT_SCHEMES = ("s3://", "gs://", "az://")
Location = str | os.PathLike[str]


class Files(Protocol):
    """Files read by their path within the cache; `str(files)` is the location as a user types it."""

    def read(self, path: str, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end) of a file, fewer if it ends earlier; FileNotFoundError if it does not exist."""
        ...

    def size(self, path: str) -> int | None:
        """Size of a file in bytes; None if it does not exist."""
        ...


class Folder(Files, Protocol):
    """The storage in which a cache is read and written."""

    def entries(self) -> list[str]:
        """Names of files and folders at the top level, sorted; empty where nothing exists yet."""
        ...

    def names(self, under: str = "") -> list[str]:
        """Paths of all files below `under`, sorted, without temporary files."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Write `data` to `path` atomically, replacing any existing file."""
        ...

    def publish(self, path: str, data: bytes) -> bool:
        """Write `data` to `path` atomically if nothing exists there; otherwise change nothing and return False."""
        ...

    def remove(self, path: str) -> None:
        """Delete a file if it exists."""
        ...

    def lock(self, name: str) -> AbstractContextManager[Callable[[], None]]:
        """Hold the lock on `name` against other builders; ShardLockedError if another one holds it.

        Yields a function to call before writing each file: ShardLockedError if the lock was lost in the meantime.
        """
        ...

    def sweep(self) -> None:
        """Delete the leftovers of killed writers."""
        ...


class LocalFolder:
    """A local folder, written by the protocol of `durable` and read by position.

    mmap is not used: on network disks it can kill the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def entries(self) -> list[str]:
        """See Folder."""
        names = (entry.name for entry in self.path.iterdir()) if self.path.is_dir() else ()
        return sorted(name for name in names if not durable.is_temporary(name))

    def read(self, path: str, begin: int = 0, end: int | None = None) -> bytes:
        """See Folder."""
        descriptor = os.open(self.path / path, os.O_RDONLY)
        try:
            length = (os.fstat(descriptor).st_size if end is None else end) - begin
            data = os.pread(descriptor, max(0, length), begin)
            # One call reads at most 2 GiB.
            while 0 < len(data) < length and (more := os.pread(descriptor, length - len(data), begin + len(data))):
                data += more
            return data
        finally:
            os.close(descriptor)

    def size(self, path: str) -> int | None:
        """See Folder."""
        file = self.path / path
        return file.stat().st_size if file.is_file() else None

    def names(self, under: str = "") -> list[str]:
        """See Folder."""
        files = (file for file in (self.path / under).rglob("*") if file.is_file())
        return sorted(file.relative_to(self.path).as_posix() for file in files if not durable.is_temporary(file.name))

    def replace(self, path: str, data: bytes) -> None:
        """See Folder."""
        durable.replace(self._own(path), data)

    def publish(self, path: str, data: bytes) -> bool:
        """See Folder."""
        return durable.publish(self._own(path), data)

    def remove(self, path: str) -> None:
        """See Folder."""
        file = self._own(path)
        if file.exists():
            file.unlink(missing_ok=True)
            durable.sync(file.parent)

    @contextmanager
    def lock(self, name: str) -> Iterator[Callable[[], None]]:
        """See Folder: one lock for all names, held only while files are moved in place."""
        with durable.locked(self.path / Path(name).parent):
            yield lambda: None

    def _own(self, path: str) -> Path:
        """The path to write to; DamagedCacheError where a link would redirect the write outside the cache."""
        file = self.path / path
        if not file.parent.resolve().is_relative_to(self.path.resolve()):
            raise DamagedCacheError(
                f"{file} would be written to {file.parent.resolve()}, outside the cache, through a link: replace the "
                f"link by a folder, or make the cache's folder itself the link"
            )
        return file

    def sweep(self) -> None:
        """See Folder."""
        durable.remove_leftovers(self.path)


def is_remote(location: Location) -> bool:
    """Whether a location names an object store."""
    return str(location).startswith(OBJECT_SCHEMES)


def open_folder(location: Location) -> Folder:
    """Open the folder at a local path or at a URL such as s3://bucket/prefix."""
    if is_remote(location):
        from secondcast.storage_schemas.io.object_folder import ObjectFolder

        return ObjectFolder(str(location))
    return LocalFolder(Path(location))


def location_of(folder: Folder) -> str:
    """Location of a folder for use by another process: an absolute path, or a URL."""
    return str(folder.path.resolve()) if isinstance(folder, LocalFolder) else str(folder)
