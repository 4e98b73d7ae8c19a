"""Writing that survives a kill and a power cut: temporary name, fsync, rename, fsync of the folder.

A name never shows a half-written file. `publish` creates and never replaces, so that of two builders
one wins and the other is told.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _write_temporary(path: Path, data: bytes | memoryview) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def sync(path: Path) -> None:
    """Have a file or a folder written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes | memoryview) -> None:
    """Put `data` under `path`, whole or not at all, replacing what was there."""
    temporary = _write_temporary(path, data)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def publish(path: Path, data: bytes | memoryview) -> bool:
    """Put `data` under `path` if nothing is there; False, and nothing changed, if something is."""
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder against other processes; it is given up when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files that a killed process left in `folder`; the number deleted.

    Only files of processes that are gone are touched: a live writer's name carries its process id.
    """
    removed = 0
    for leftover in folder.rglob(".*.tmp"):
        owner = leftover.name.rsplit(".", 2)[-2].split("-")[0]
        if owner.isdigit() and not _is_alive(int(owner)):
            leftover.unlink(missing_ok=True)
            removed += 1
    return removed


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
